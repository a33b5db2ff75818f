# make train         sets up .venv and trains the default (digits, a few minutes on a CPU); ARGS="model=... attention=..." changes it
# make test          adds what tests need, then lint and the CPU suite; the kernels interpreted, in a process of their own
# make test-all      make test, then the full matrices that it leaves out (tests marked `full`)
# make faults        the long experiments with faults that test-all has no time for: many kills, a soak (tests/faults)
# make test-lowest   the suite of make test with the oldest versions that requirements*.txt admit, in .venv-lowest
# make constraints   writes constraints.txt anew: the newest versions that requirements*.txt admit, from .venv-newest
# make format        mends what ruff can
PYTHON ?= python3
VENV   ?= .venv
LOWEST ?= .venv-lowest
NEWEST ?= .venv-newest

TRAINS := $(VENV)/.ready-to-train
TESTS  := $(VENV)/.ready-to-test
BOUNDS := requirements.txt requirements-extra.txt requirements-dev.txt

new_venv = $(PYTHON) -B -c "import conf" && $(PYTHON) -m venv $(1)
pip      = $(1)/bin/python -m pip install --quiet
# what a machine without a GPU can run of the tests that match $(2), twice: Triton is interpreted by a whole process or
# not at all. Status 5: none of them match, as while developing with ARGS="tests/some_file.py"
pytest   = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2 --dist worksteal -m $(2) $(ARGS) || [ $$? -eq 5 ]
kernels  = OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(1)/bin/python -m pytest -n 2 --dist worksteal -m $(2) $(ARGS) || [ $$? -eq 5 ]

.PHONY: train test test-all faults test-lowest lint format constraints

train: $(TRAINS)
	$(VENV)/bin/python train.py $(ARGS)

test: lint
	$(call pytest,$(VENV),"not full and not faults")
	$(call kernels,$(VENV),"not full and not faults")

test-all: test
	$(call pytest,$(VENV),"full and not faults")
	$(call kernels,$(VENV),"full and not faults")

faults: $(TESTS)
	$(call pytest,$(VENV),faults)

test-lowest: $(LOWEST)/.ready-to-test
	$(call pytest,$(LOWEST),"not full and not faults")
	$(call kernels,$(LOWEST),"not full and not faults")

lint: $(TESTS)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(TESTS)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(TRAINS): requirements.txt constraints.txt
	$(call new_venv,$(VENV))
	$(call pip,$(VENV)) --constraint constraints.txt --requirement requirements.txt
	touch $@

$(TESTS): $(TRAINS) $(BOUNDS)
	$(call pip,$(VENV)) --constraint constraints.txt --requirement requirements-dev.txt
	touch $@

# "name>=1.2,!=1.3,<2; marker  # why" becomes "name==1.2; marker"
$(LOWEST)/.ready-to-test: $(BOUNDS)
	$(call new_venv,$(LOWEST))
	sed -nE 's/^([A-Za-z0-9._-]+)>=([0-9.]+)[^;#]*(;[^#]*)?.*/\1==\2\3/p' $(BOUNDS) > $(LOWEST)/lowest.txt
	$(call pip,$(LOWEST)) --requirement $(LOWEST)/lowest.txt
	touch $@

constraints:
	rm -rf $(NEWEST)
	$(call new_venv,$(NEWEST))
	$(call pip,$(NEWEST)) --requirement requirements-dev.txt
	{ sed -n '/^#/p' constraints.txt; $(NEWEST)/bin/python -m pip freeze --all | grep -vE '^(nvidia-|cuda-|pip==)'; } > $(NEWEST)/new.txt
	mv $(NEWEST)/new.txt constraints.txt
