"""When a run writes checkpoints and which are kept: the callback in place of Lightning's `ModelCheckpoint`.

`Trainer(plugins=[DirectoryCheckpointIO()], callbacks=[EMA(), Checkpoints()], enable_checkpointing=False)`.
"""

import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from conf.errors import UserError
from models.callbacks.directory_io import CONFIG_KEY, METRICS_KEY
from models.callbacks.loops import (
    Position,
    begin_between_epochs,
    call_last,
    end_all,
    go_on,
    log_step,
    position,
    validate_at_the_end,
    validate_now,
    validation_follows,
    validation_is_due,
)
from models.checkpoints.format.directory import CorruptCheckpoint, latest, read_manifest, step_directories, step_name
from models.checkpoints.format.write import point, probe, remove_checkpoint, sweep
from models.side_outputs import attempt

log = logging.getLogger(__name__)


class Checkpoints(Callback):
    """Saves at optimizer-step boundaries, around every validation and at the end, and keeps the last and the best.

    A checkpoint is written before a validation as well as after it, so that a run that is stopped while validating
    loses no step; a run resumed from there makes up for the missed validation first.

    Args:
        every_n_steps: optimizer steps between saves; 0 saves only around validations and at the end.
        monitor: the logged metric that decides which checkpoint is `best`; None for no `best`.
        mode: "max" or "min". Of equal values the earlier one stays the best.
        keep: how many further old checkpoints stay besides `last` and `best`.
        dirpath: the folder; default `checkpoints` in the run's folder.

    It is called after all other callbacks, wherever it stands in the list: they must have seen the step that is saved.
    """

    MAX_FAILURES = 3

    def __init__(
        self,
        every_n_steps: int = 1000,
        monitor: str | None = "val/top1",
        mode: str = "max",
        keep: int = 1,
        dirpath: str | None = None,
    ) -> None:
        if mode not in ("max", "min"):
            raise UserError(f"Checkpoints: mode must be 'max' or 'min', got {mode!r}")
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if type(value) is not int or value < 0:
                raise UserError(f"Checkpoints: {name} must be an integer of at least 0, got {value!r}")
        self.every_n_steps, self.monitor, self.mode, self.keep = every_n_steps, monitor, mode, keep
        self.directory = Path(dirpath) if dirpath is not None else None
        self.config: dict[str, Any] = {}
        self.saved_step = -1  # the step of the checkpoint that this run wrote last or started from; -1: none
        self._best_score, self._best_step = math.nan, -1
        self._metrics: dict[str, float] = {}
        self._figures: dict[str, float] = {}  # of the step before a validation, which may be made up for without them
        self._seen_step = 0
        self._failures = 0
        self._validation_due = False
        self.position: Position | None = None  # of the next batch
        self.unfinished = False  # what follows the last step has still to be done, also when nothing is left to train

    def describe_run(self, run_dir: str | Path, config: dict[str, Any]) -> None:
        """Tells the folder of the run and its resolved, plain configuration, which is stored with each checkpoint."""
        self.directory = Path(run_dir) / "checkpoints" if self.directory is None else self.directory
        self.config = config

    @property
    def best_score(self) -> float | None:
        """The best value of the monitored metric so far; None before the first validation."""
        return None if math.isnan(self._best_score) else self._best_score

    @property
    def last(self) -> Path | None:
        """The newest checkpoint that this run has written or started from; None if there is none."""
        return None if self.saved_step < 0 else self.directory / step_name(self.saved_step)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tries the folder before anything slow happens.

        Raises:
            ValueError: the folder cannot be written.
        """
        if stage != "fit" or trainer.fast_dev_run:
            return
        call_last(trainer, self)
        end_all(trainer, lambda: self._validation_due or self.unfinished)
        self.directory = Path(trainer.default_root_dir) / "checkpoints" if self.directory is None else self.directory
        problem = None
        if trainer.is_global_zero:
            try:
                probe(self.directory)
                sweep(self.directory)
            except OSError as error:
                problem = f"{error.strerror or error} and {_free_bytes(self.directory)} bytes free"
        problem = trainer.strategy.broadcast(problem, src=0)  # so that no rank is left waiting
        if problem is not None:
            raise UserError(
                f"Checkpoints: the folder for checkpoints must be writable, got {self.directory} with {problem}; "
                "choose another run folder"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses to write older steps into a folder that already holds newer ones, and makes up for a validation.

        Raises:
            ValueError: the folder holds a valid checkpoint of a later step than the one training starts from, or
                checkpoints of which none can be read.
        """
        self._seen_step = trainer.global_step
        begin_between_epochs(trainer)
        if trainer.fast_dev_run:
            return
        found = trainer.strategy.broadcast(self._newest() if trainer.is_global_zero else None, src=0)
        if isinstance(found, str):  # so that no rank is left waiting
            raise UserError(found)
        step = found
        if step > trainer.global_step:
            raise UserError(
                f"Checkpoints: {self.directory} must not hold steps newer than the one training starts from, "
                f"{trainer.global_step}, got {step_name(step)}; use resume=auto to continue it, or another run.name"
            )
        self.saved_step = step if step == trainer.global_step else -1
        self._forget_best_of_elsewhere(trainer)
        if self.saved_step >= 0 and trainer.is_global_zero:  # killed before the pointers were moved
            attempt("the pointers best and last", self._arrange, self.directory / step_name(step))
        self._validation_due = self._validation_due and validation_is_due(trainer)
        if self._validation_due:
            validate_now(trainer)

    def _newest(self) -> int | str:
        """The newest valid step of the folder, -1 for none, or why none of those that are there can be read."""
        try:
            newest = latest(self.directory, log.warning)
        except CorruptCheckpoint as error:
            return str(error)
        return -1 if newest is None else read_manifest(newest)["step"]

    def _forget_best_of_elsewhere(self, trainer: pl.Trainer) -> None:
        """A run that goes on in another folder, or without its best checkpoint, has no `best` until it finds one."""
        here = self._best_step in step_directories(self.directory) if trainer.is_global_zero else False
        if self._best_step >= 0 and not trainer.strategy.broadcast(here, src=0):
            if trainer.is_global_zero:
                log.warning(
                    "Checkpoints: the best so far, %.4g in %s, is not in %s; the best is chosen anew from here",
                    *(self._best_score, step_name(self._best_step), self.directory),
                )
            self._best_score, self._best_step = math.nan, -1

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_score": self._best_score,
            "best_step": self._best_step,
            "validation_due": self._validation_due,
            "figures": self._figures,
            "position": None if self.position is None else list(self.position),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best_score, self._best_step = state_dict["best_score"], state_dict["best_step"]
        self._validation_due = state_dict["validation_due"]
        self._figures = state_dict.get("figures", {})

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        if trainer.state.fn == "fit":
            saved = checkpoint["callbacks"].get(self.state_key, {})
            self.position = go_on(trainer, checkpoint, saved.get("position"))

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        checkpoint[CONFIG_KEY], checkpoint[METRICS_KEY] = self.config, self._metrics

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Lightning's count for loggers; it loses one where a run goes on behind a validation in the middle of an epoch
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._seen_step:  # in the middle of an accumulated batch: its gradients are in no checkpoint
            return
        self._seen_step, self.position = step, position(trainer)
        self._metrics = {}
        validate_at_the_end(trainer)
        self._validation_due = validation_follows(trainer)
        if self._validation_due or (self.every_n_steps and step % self.every_n_steps == 0):
            log_step(trainer)  # a run that is killed right behind the checkpoint has the row
            self._figures = _numbers(trainer.callback_metrics)
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves with the new metrics, as the best if it is.

        Raises:
            ValueError: the metric to monitor was not logged.
        """
        if trainer.sanity_checking or trainer.state.fn != "fit" or trainer.fast_dev_run:
            return
        self._metrics = self._figures | _numbers(trainer.callback_metrics)
        self._validation_due = False
        before = self._best_score, self._best_step
        if self.monitor is not None and self._improves():
            self._best_score, self._best_step = self._metrics[self.monitor], trainer.global_step
        if not self.save(trainer):
            self._best_score, self._best_step = before

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.saved_step != trainer.global_step:
            self.save(trainer)

    def _improves(self) -> bool:
        if self.monitor not in self._metrics:
            raise UserError(
                f"Checkpoints: the monitored metric must be logged in validation, got {self.monitor!r}; "
                f"logged are: {', '.join(sorted(self._metrics))}"
            )
        score = self._metrics[self.monitor]
        if math.isnan(score) or math.isnan(self._best_score):
            return not math.isnan(score)
        return score > self._best_score if self.mode == "max" else score < self._best_score

    def save(self, trainer: pl.Trainer) -> bool:
        """Saves now, on all ranks together; False where the storage failed and training can go on.

        Raises:
            RuntimeError: this was the third failure in a row.
        """
        if trainer.fast_dev_run:
            return True
        error: OSError | None = None
        path = self.directory / step_name(trainer.global_step)
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except OSError as caught:
            error = caught
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other ranks wait for this one
        if error is None and trainer.is_global_zero:
            try:
                self._arrange(path)
            except OSError as caught:
                error = caught
        failed = trainer.strategy.broadcast(error is not None, src=0)
        if not failed:
            self._failures, self.saved_step = 0, trainer.global_step
            return True
        self._failures += 1
        reason = f"{error.strerror or error}" if error is not None else "an error on rank 0"
        message = f"Checkpoints: step {trainer.global_step} could not be saved in {self.directory} ({reason}, "
        message += f"{_free_bytes(self.directory)} bytes free)"
        if self._failures >= self.MAX_FAILURES:
            raise RuntimeError(f"{message}; {self._failures} saves in a row failed: free space or mend the folder")
        if trainer.is_global_zero:
            log.warning("%s; older checkpoints stay and training goes on", message)
        return False

    def _arrange(self, path: Path) -> None:
        """Moves the pointers to the new checkpoint and deletes what is no longer kept."""
        point(self.directory / "last", path)
        steps = step_directories(self.directory)
        best = steps.get(self._best_step)
        if best is not None:
            point(self.directory / "best", best)
        older = [entry for entry in steps.values() if entry.name != path.name and entry != best]
        for entry in older[: max(len(older) - self.keep, 0)]:
            remove_checkpoint(entry)


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}


def _free_bytes(directory: Path) -> int:
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free
