"""How a run ends: what it leaves, with which status, and what to do next."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from conf.errors import UserError
from models.loggers.weights_and_biases import SafeWandb, log_picture
from models.runs.curves import draw_curves
from models.runs.headline import title
from models.runs.memory import explained
from models.side_outputs import attempt


@contextmanager
def ending(trainer: pl.Trainer, run_dir: Path, config: dict[str, Any]) -> Iterator[None]:
    """No memory, or a setting that Lightning refuses, ends the process with a status and what to do next."""
    try:
        with explained(config, trainer):
            yield
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    finally:
        if trainer.is_global_zero:
            attempt("curves.png", _curves, trainer, run_dir, config)
        for logger in trainer.loggers:
            if isinstance(logger, SafeWandb):
                attempt("logger: the end of Weights & Biases", logger.close)


def _curves(trainer: pl.Trainer, run_dir: Path, config: dict[str, Any]) -> None:
    steps = trainer.num_training_batches / trainer.accumulate_grad_batches
    best = config["checkpoint"]
    per_epoch = steps if 0 < steps < math.inf else None
    curves = draw_curves(run_dir, title(config), best["monitor"], best["mode"], per_epoch)
    if curves is not None:
        log_picture(trainer.loggers, "curves", curves)
