"""train.py with a launcher, in this process, with a small program in the place of what its jobs run."""

import sys

import pytest

from conf import cli
from models.runs import launchers


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    """`launch(program, job, "seed=1", ...) -> (exit status, output, errors)` of train.py in `tmp_path`; no pictures."""
    for name in ("draw_comparison", "draw_pareto"):
        monkeypatch.setattr(f"models.runs.sweep_pictures.{name}", lambda *given: None)
    monkeypatch.setattr("hydra._internal.hydra.Hydra.get_mode", lambda hydra, config_name, overrides: None)
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "VISION_ZOO_RUN_NAME"):
        monkeypatch.delenv(name, raising=False)

    def run(program, job, *arguments):
        (tmp_path / "train.py").write_text(program)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        launchers.register()
        try:
            cli.run("train", job)
            status = 0
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return run
