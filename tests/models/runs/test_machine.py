"""Precision and threads that fit the machine."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from conf.errors import UserError
from data import cores
from models.runs import machine


def config(**trainer):
    return OmegaConf.create(
        {"trainer": {"precision": "auto", "accelerator": "auto", "devices": 1, "num_nodes": 1} | trainer}
    )


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with or without bf16, as far as precision asks."""

    def make(bf16: bool) -> list[str]:
        asked: list[str] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 and not including_emulation
        )
        monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
        return asked

    return make


@pytest.mark.parametrize(
    ("bf16", "given", "precision", "tf32"),
    [
        (True, {}, "bf16-mixed", []),
        (False, {}, "32-true", ["high"]),
        (True, {"precision": "32-true"}, "32-true", []),
        (True, {"precision": "16-mixed"}, "16-mixed", []),
        (True, {"accelerator": "cpu"}, "32-true", []),
    ],
)
def test_a_gpu_gets_the_precision_that_it_has(gpu, bf16, given, precision, tf32):
    asked, cfg = gpu(bf16), config(**given)
    notes = machine.fit_precision(cfg)
    assert cfg.trainer.precision == precision and asked == tf32
    assert bool(notes) == ("precision" not in given and "accelerator" not in given)


def test_a_cpu_keeps_32_bits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = config()
    assert machine.fit_precision(cfg) == [] and cfg.trainer.precision == "32-true"


def test_a_gpu_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.MPSAccelerator, "is_available", staticmethod(lambda: False))
    for wanted in ("gpu", "cuda"):
        with pytest.raises(
            UserError, match=rf"accelerator={wanted} needs a GPU .*got none \(.+\); set trainer.accelerator=auto"
        ):
            machine.check_accelerator({"accelerator": wanted})
    machine.check_accelerator({"accelerator": "auto"})
    machine.check_accelerator({"accelerator": "cpu"})


@pytest.mark.parametrize(
    ("usual", "quota", "free", "threads"),
    [
        (2, math.inf, 1.9, 2),
        (2, math.inf, 0.1, 1),
        (2, math.inf, 1.4, 1),
        (2, math.inf, None, 2),
        (64, math.inf, 60.2, 64),
        (64, math.inf, 20.7, 20),
        (64, 4.0, 50.0, 4),
        (64, 4.0, 2.5, 2),
        (8, 0.5, None, 1),
    ],
)
def test_threads_are_as_many_as_cores_are_free(usual, quota, free, threads):
    assert machine.choose_threads(usual, quota, free) == threads


def test_a_run_on_a_busy_machine_says_so_and_a_resumed_one_keeps_its_threads(monkeypatch):
    for name in machine.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(machine, "USUAL", 8)
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    monkeypatch.setattr(machine, "free_cores", lambda: 3.2)
    monkeypatch.setattr(machine, "quota", lambda: math.inf)
    cfg = config(accelerator="cpu")
    number, notes = machine.fit_threads(cfg, None)
    assert number == 3 and notes[0].startswith("3 threads: of 8 cores 3.2 free") and "OMP_NUM_THREADS=8" in notes[0]
    assert machine.fit_threads(cfg, 6) == (6, ["6 threads: as before the stop; OMP_NUM_THREADS=8 insists on 8"])
    assert machine.fit_threads(cfg, 8) == (8, []) and chosen == [3, 6, 8]
    assert machine.fit_threads(cfg, 16)[0] == 3  # of a larger machine
    chosen.clear()
    machine.fit_threads(config(accelerator="cpu", devices=2), None)  # Lightning shares the cores between processes
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    machine.fit_threads(cfg, None)
    assert chosen == []


def test_idle_time_is_that_of_the_own_cores():
    lines = ["cpu  9 9 9 999 9", "cpu0 1 2 3 400 100 0 0 0", "cpu1 1 2 3 50 0 0 0 0", "intr 5", ""]
    assert cores.idle_seconds(lines, [1], 100) == {1: 0.5}
    assert cores.idle_seconds(lines, [0, 7], 100) == {0: 5.0}


def test_what_this_process_computes_counts_as_free(monkeypatch):
    start = cores._Times(0.0, 0.0, {0: 0.0, 1: 0.0})
    monkeypatch.setattr(cores, "_START", start)
    monkeypatch.setattr(cores, "_times", lambda: cores._Times(10.0, 9.0, {0: 0.5, 1: 3.0}))
    assert cores.free_cores.__wrapped__() == pytest.approx(0.05 + 0.3 + 0.9)
    monkeypatch.setattr(cores, "_times", lambda: cores._Times(0.1, 0.1, {0: 0.0, 1: 0.0}))
    assert cores.free_cores.__wrapped__() is None  # too short to tell


def test_the_limit_of_a_control_group_is_found(tmp_path, monkeypatch):
    assert cores.quota() >= 0.01
    (tmp_path / "job/step").mkdir(parents=True)
    (tmp_path / "job/cpu.max").write_text("250000 100000\n")
    (tmp_path / "job/step/cpu.max").write_text("max 100000\n")
    assert cores.quota_of(tmp_path / "job/step") == 2.5
    assert cores.quota_of(tmp_path / "nowhere") == math.inf
