"""From `python train.py` to the formula of softmax attention: the functions of ours that CONTRIBUTING.md lists."""

import re
import traceback

import pytest

from tests.conftest import ROOT

MOST = 11  # frames of ours below the command, the formula included; fewer are better


class Reached(BaseException):
    """Raised in the formula, through everything that reports errors."""


@pytest.fixture
def walk(command, monkeypatch):
    """(file, function) of every frame of ours in a training step below the command, the outermost first."""
    found: list[tuple[str, str]] = []

    def formula(*_: object, **__: object) -> None:
        for frame in traceback.extract_stack():
            name = frame.filename.removeprefix(f"{ROOT}/")
            if name not in (frame.filename, "train.py") and not name.startswith(("tests/", ".venv")):
                found.append((name, frame.name.strip("<>")))
        raise Reached

    monkeypatch.setattr("models.attention.softmax.softmax_heads", formula)
    monkeypatch.setattr("models.runs.training.facts_of", lambda *_: {})  # counts multiply-adds before the first step
    small = ("logger=none", "data.batch_size=2", "data.workers=0", "trainer.limit_val_batches=0")
    with pytest.raises(Reached):
        command("train", "model=vit_32px", "attention=softmax", *small)
    return [*found, ("kernels/window_attention/__init__.py", "definition")]


def test_the_walk_is_as_written_and_short(walk):
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## A walk")[2].partition("\n## ")[0]
    written = re.findall(r"^\d+\. \[`(.+?)`\]\(.+?\) `(\w+)`", text, re.MULTILINE)
    shown = "\n".join(f"{number}. [`{file}`]({file}) `{name}`" for number, (file, name) in enumerate(walk, 1))
    assert written == walk, f"the walk in CONTRIBUTING.md is now\n{shown}"
    assert len(walk) <= MOST
