"""Loggers of a run: metrics.csv always; Weights & Biases or TensorBoard when chosen. None of them can stop a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from conf.errors import UserError
from models.loggers.metrics_csv import MetricsCSV
from models.loggers.weights_and_biases import open_wandb
from models.side_outputs import attempt

NAMES = ("wandb", "csv", "tensorboard", "none")


def build_loggers(
    settings: Mapping[str, Any],
    run_dir: Path,
    config: dict[str, Any],
    resume_step: int,
    facts: Mapping[str, Any] | None = None,
    figures: Sequence[str] = (),
) -> list[Logger]:
    """The loggers of one run; metrics.csv first.

    Args:
        settings: the group `logger`: `name`, and the keywords of that logger.
        run_dir: where everything is written.
        config: the resolved configuration, shown by W&B.
        resume_step: the optimizer step that the run continues from; later rows of an existing metrics.csv are dropped.
        facts: what else is known of the run, shown by W&B beside the configuration.
        figures: what validation logs; W&B keeps the best value of each.
    """
    name = settings["name"]
    if name not in NAMES:
        raise UserError(f"logger: name must be one of {', '.join(NAMES)}, got {name!r}; set logger=csv, for instance")
    loggers: list[Logger] = [MetricsCSV(run_dir / "metrics.csv", resume_step)]
    if name == "wandb" and rank_zero_only.rank == 0:
        loggers += open_wandb(settings, run_dir, config, facts, figures)
    if name == "tensorboard":
        attempt("logger: TensorBoard", lambda: loggers.append(_tensorboard(run_dir)))
    return loggers


def _tensorboard(run_dir: Path) -> Logger:
    from models.loggers.event_files import SafeTensorBoard

    return SafeTensorBoard(run_dir, name="", version="tensorboard")
