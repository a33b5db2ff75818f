"""Shared by all tests: the command line in this process, the same random numbers, and which tests run interpreted.

Fused paths run on a GPU, or interpreted in a process that was started with TRITON_INTERPRET=1. Without a GPU such a
process runs the tests of `tests/kernels` and those marked `fused`; any other process runs the rest. `make test` starts
both; `pytest tests/kernels` alone is interpreted by itself.
"""

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "tests" / "kernels"
os.environ.setdefault("WANDB_MODE", "disabled")


def pytest_configure(config):
    paths = [Path(config.invocation_params.dir, argument.partition("::")[0]) for argument in config.args]
    if all(path.is_relative_to(KERNELS) for path in paths) and not _gpu():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config, items):
    if _gpu():
        return
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    chosen = [i for i in items if interpreted == (i.path.is_relative_to(KERNELS) or "fused" in i.keywords)]
    config.hook.pytest_deselected(items=[i for i in items if i not in set(chosen)])
    items[:] = chosen


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """A test draws the same numbers whatever ran before it in its process, which depends on how busy the others are."""
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`command("train", "attention=agent") -> (exit status, output, errors)`, run in `tmp_path`."""

    def run(program: str, *arguments: str) -> tuple[int, str, str]:
        from conf import cli, evaluation

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(ROOT / f"{program}.py"), *arguments])
        monkeypatch.delenv("VISION_ZOO_RUN_NAME", raising=False)
        module = {}
        exec(compile((ROOT / f"{program}.py").read_text(), f"{program}.py", "exec"), module)
        before = evaluation.take_config if program == "eval" else None
        try:
            cli.run(program, module["main"], before=before)
            status = 0
        except SystemExit as exit:
            status = exit.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
