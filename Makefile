# make train   sets up .venv and trains the default (digits, a few minutes on a CPU); ARGS="model=... attention=..." changes it
# make test    sets up .venv, then lint and the whole CPU test suite; the kernels interpreted, in a process of their own
PYTHON ?= python3
VENV   ?= .venv
READY  := $(VENV)/.ready

.PHONY: train test lint format

train: $(READY)
	$(VENV)/bin/python train.py $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile $(ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -n 2 $(ARGS) || [ $$? -eq 5 ]

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@
