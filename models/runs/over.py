"""Whether a run has come to its end, which limit that was, and what its folder knows of it."""

import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from models.callbacks.checkpoint import saver_of
from models.checkpoints import read_manifest
from models.checkpoints.format.codec import decode


def reported_step(run_dir: Path) -> int | None:
    """The step of which metrics.json tells; None where there is none, or it was not written whole."""
    try:
        steps = json.loads((run_dir / "metrics.json").read_text()).get("steps")
    except (OSError, ValueError, AttributeError):
        return None
    return steps if isinstance(steps, int) else None


def limit_of(trainer: pl.Trainer) -> str | None:
    """The setting that a run has reached; None for one that was ended earlier."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return "trainer.max_steps"
    saver = saver_of(trainer)
    at = None if saver is None else saver.position
    if trainer.max_epochs in (None, -1) or (at is not None and at < (trainer.max_epochs, 0)):
        return None
    return "trainer.max_epochs"


def out_of_time(trainer: pl.Trainer, max_time: Any) -> str:
    """What to say of a start that `max_time` ended."""
    total = trainer.estimated_stepping_batches
    of = f" of {total:.0f}" if total < float("inf") else ""
    return f"trainer.max_time={max_time} ended this start at step {trainer.global_step}{of}; the same command goes on"


def saved_figures(trainer: pl.Trainer) -> dict[str, float]:
    """What was measured last, from the checkpoint: of a run that was ended between it and its metrics.json."""
    saver = saver_of(trainer)
    if saver is None or saver.last is None:
        return {}
    return {name: float(value) for name, value in decode(read_manifest(saver.last)["metrics"], {}).items()}
