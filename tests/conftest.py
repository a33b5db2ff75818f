"""Shared by all tests: the command line in this process, folders of images, random numbers, what is interpreted, when.

Fused paths run on a GPU, or interpreted in a process that was started with TRITON_INTERPRET=1. Without a GPU such a
process runs the tests of `tests/kernels` and those marked `fused`; any other process runs the rest. `make test` starts
both; `pytest tests/kernels` alone is interpreted by itself.
"""

import os
import random
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
KERNELS = TESTS / "kernels"
# quick tests with much to say, so that a mistake shows within seconds
FIRST = (
    "test_floors.py",
    "conf",
    "contract",
    "models/attention/test_contract.py",
    "models/layers",
    "data/test_configs.py",
)
os.environ.setdefault("WANDB_MODE", "disabled")


def pytest_configure(config):
    paths = [Path(config.invocation_params.dir, argument.partition("::")[0]) for argument in config.args]
    if all(path.is_relative_to(KERNELS) for path in paths) and not _gpu():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_ignore_collect(collection_path):
    """A file whose tests this process does not run is not imported, which takes longer than some of them."""
    if collection_path.suffix != ".py" or _gpu():
        return None
    fused = collection_path.is_relative_to(KERNELS) or "mark.fused" in collection_path.read_text()
    both = fused and not collection_path.is_relative_to(KERNELS)
    return True if not both and fused != (os.environ.get("TRITON_INTERPRET") == "1") else None


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: not any(item.path.is_relative_to(TESTS / first) for first in FIRST))
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


@pytest.fixture(scope="session", autouse=True)
def _compositions(tmp_path_factory):
    """What `create_model` composes is composed once for all processes of a run; the tests of kernels need no Hydra."""
    if find_spec("hydra") is None:
        yield
        return
    from models import factory
    from tests import compositions

    base = tmp_path_factory.getbasetemp()
    compositions.share((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compositions")
    factory.compose_run = compositions.compose_once
    yield
    factory.compose_run = compositions.compose_run


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`command("train", "attention=agent") -> (exit status, output, errors)`, run in `tmp_path`.

    It draws no curves and charts, which takes as long as a small run, and times a model for a moment. Hydra composes
    everything once more to find `hydra.mode`, which only recipes set: without one it does not.
    """
    monkeypatch.setattr("models.runs.ending.draw_curves", lambda *arguments: None)
    monkeypatch.setattr("models.runs.sweep_pictures.draw_comparison", lambda *args: None)
    monkeypatch.setattr("models.runs.sweep_pictures.draw_pareto", lambda *args: None)
    monkeypatch.setattr("models.probes.accuracy.charts_of", lambda *given: {})
    monkeypatch.setattr("models.probes.reading.forward_cost.SECONDS", 0.01)

    def run(program: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(ROOT / f"{program}.py"), *arguments])
        monkeypatch.delenv("VISION_ZOO_RUN_NAME", raising=False)
        with monkeypatch.context() as patched:
            if not any(argument.startswith("recipe=") for argument in arguments):
                patched.setattr("hydra._internal.hydra.Hydra.get_mode", lambda hydra, config_name, overrides: None)
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
                status = 0
            except SystemExit as exit:
                status = exit.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def image_tree(tmp_path):
    """A function that writes `root/{train,val}/<class>/<i>.png` of plain colours and returns `root`."""
    from PIL import Image

    def make(classes=("bee", "ant"), train=3, val=2, size=(12, 10)) -> Path:
        for split, count in (("train", train), ("val", val)):
            for label, name in enumerate(classes):
                folder = tmp_path / "images" / split / name
                folder.mkdir(parents=True, exist_ok=True)
                for i in range(count):
                    pixels = np.full((size[1], size[0], 3), 40 * label + i, np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
        return tmp_path / "images"

    return make
