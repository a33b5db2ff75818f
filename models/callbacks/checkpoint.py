"""When a run writes checkpoints: the callback in place of Lightning's `ModelCheckpoint`.

`Trainer(plugins=[DirectoryCheckpointIO()], callbacks=[EMA(), Checkpoints()], enable_checkpointing=False)`.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from conf.errors import NumericsFailed, StorageFailed, UserError
from models.callbacks.boundary import Boundary
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
from models.callbacks.pace import Pace
from models.callbacks.retention import Ranked, Retention
from models.callbacks.saving import Saver, free_bytes
from models.checkpoints.format.directory import CorruptCheckpoint, latest, read_manifest, step_name
from models.checkpoints.format.write import probe, sweep

log = logging.getLogger(__name__)


class Checkpoints(Callback):
    """Saves at optimizer-step boundaries, around every validation and at the end, and keeps the last and the best.

    A checkpoint is written before a validation as well as after it, so that a run that is stopped while validating
    loses no step; a run resumed from there makes up for the missed validation first. A single process that ends with
    an error saves its last finished step; of several, the others may wait elsewhere. Training stands still while the
    tensors are copied, and goes on while the copies are written; at most one save is under way.

    Args:
        every_n_steps: optimizer steps between saves; 0 saves only around validations and at the end.
        monitor: the logged metric that decides which checkpoint is `best`; None for no `best`.
        mode: "max" or "min". Of equal values the earlier one stays the best.
        keep: how many further old checkpoints stay besides `last` and `best`.
        dirpath: the folder; default `checkpoints` in the run's folder.
        keep_every_n_steps: a checkpoint of every so many steps, which is never deleted; None for none.
        every_minutes: a save after so many minutes without one; None for never.
        top_k: how many of the best stay.

    It is called after all other callbacks, wherever it stands in the list: they must have seen the step that is saved.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        monitor: str | None = "val/top1",
        mode: str = "max",
        keep: int = 1,
        dirpath: str | None = None,
        keep_every_n_steps: int | None = None,
        every_minutes: float | None = None,
        top_k: int = 1,
    ) -> None:
        if mode not in ("max", "min"):
            raise UserError(f"Checkpoints: mode must be 'max' or 'min', got {mode!r}")
        whole = {"every_n_steps": (every_n_steps, 0), "keep": (keep, 0), "top_k": (top_k, 1)}
        if keep_every_n_steps is not None:
            whole["keep_every_n_steps"] = keep_every_n_steps, 1
        for name, (value, least) in whole.items():
            if type(value) is not int or value < least:
                raise UserError(f"Checkpoints: {name} must be an integer of at least {least}, got {value!r}")
        self.every_n_steps, self.keep_every_n_steps, self.monitor = every_n_steps, keep_every_n_steps, monitor
        self.pace = Pace(every_minutes)
        self.kept = Retention(keep, keep_every_n_steps, top_k, mode)
        self.saver = Saver(self.kept)
        self.directory = Path(dirpath) if dirpath is not None else None
        self.config: dict[str, Any] = {}
        self._loaded_step = -1
        self._metrics: dict[str, float] = {}
        self._figures: dict[str, float] = {}  # of the step before a validation, which may be made up for without them
        self._seen_step = 0
        self._validation_due = False
        self._boundary: Boundary | None = None  # of a single process
        self._stepping = self._leaving = False
        self.position: Position | None = None  # of the next batch
        self.unfinished = False  # what follows the last step has still to be done, also when nothing is left to train

    def describe_run(self, run_dir: str | Path, config: dict[str, Any]) -> None:
        """Tells the folder of the run and its resolved, plain configuration, which is stored with each checkpoint."""
        self.directory = Path(run_dir) / "checkpoints" if self.directory is None else self.directory
        self.config = config

    @property
    def best_score(self) -> float | None:
        """The best value of the monitored metric so far; None before the first validation."""
        return None if self.kept.best is None else self.kept.best.score

    @property
    def saved_step(self) -> int:
        """The step of the checkpoint that this run wrote last or started from; -1: none."""
        return self.saver.saved_step

    @property
    def last(self) -> Path | None:
        """The newest checkpoint that this run has written or started from; None if there is none."""
        return self.saver.last

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
        self.saver.directory, self.saver.writes = self.directory, trainer.is_global_zero
        problem = None
        if trainer.is_global_zero:
            try:
                probe(self.directory)
                sweep(self.directory)
            except OSError as error:
                problem = f"{error.strerror or error} and {free_bytes(self.directory)} bytes free"
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
        step = trainer.strategy.broadcast(self._newest() if self.saver.writes else None, src=0)
        if isinstance(step, str):  # so that no rank is left waiting
            raise UserError(step)
        if step > trainer.global_step:
            raise UserError(
                f"Checkpoints: {self.directory} must not hold steps newer than the one training starts from, "
                f"{trainer.global_step}, got {step_name(step)}; use resume=auto to continue it, or another run.name"
            )
        self.saver.saved_step = step if step == trainer.global_step else -1
        self._forget_best_of_elsewhere(trainer)
        self._validation_due = self._validation_due and validation_is_due(trainer)
        self.pace.begin(trainer.global_step)
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
        """A run that goes on in another folder, or without its best checkpoints, ranks those that are there."""
        source = self.directory if trainer.ckpt_path is None else Path(trainer.ckpt_path).resolve().parent
        there = self.kept.found(self.directory, source) if self.saver.writes else None
        there = trainer.strategy.broadcast(there, src=0)
        best = self.kept.best
        if self.saver.writes and best is not None and best.step not in there:
            log.warning(
                "Checkpoints: the best so far, %.4g in %s, is not in %s; the best is chosen anew from here",
                *(best.score, step_name(best.step), self.directory),
            )
        self.kept.ranked = tuple(entry for entry in self.kept.ranked if entry.step in there)

    def state_dict(self) -> dict[str, Any]:
        best = self.kept.best or Ranked(float("nan"), -1)
        return {
            "best_score": best.score,
            "best_step": best.step,
            "ranked": [list(entry) for entry in self.kept.ranked],
            "validation_due": self._validation_due,
            "figures": self._figures,
            "position": None if self.position is None else list(self.position),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        best = [(state_dict["best_score"], state_dict["best_step"])] if state_dict["best_step"] >= 0 else []
        self.kept.ranked = tuple(Ranked(*entry) for entry in state_dict.get("ranked", best))
        self._validation_due = state_dict["validation_due"]
        self._figures = state_dict.get("figures", {})
        self._point_again()

    def _point_again(self) -> None:
        """A run that was killed before its pointers moved finds them moved, also where it has nothing left to do."""
        try:
            if self.saver.writes and self._newest() == self._loaded_step:
                self.kept.arrange(self.directory, self.directory / step_name(self._loaded_step))
        except OSError as error:
            log.warning("Checkpoints: `last` and `best` could not be moved: %s", error)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        if trainer.state.fn == "fit":
            self._loaded_step = checkpoint["global_step"]
            saved = checkpoint["callbacks"].get(self.state_key, {})
            self.position = go_on(trainer, checkpoint, saved.get("position"))

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        checkpoint[CONFIG_KEY], checkpoint[METRICS_KEY] = self.config, self._metrics
        if self._leaving:
            self._boundary.write_into(checkpoint, trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Lightning's count for loggers; it loses one where a run goes on behind a validation in the middle of an epoch
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self._stepping = True  # until all callbacks have seen the step

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
        self._stepping = False
        if trainer.fast_dev_run:
            return
        if trainer.world_size == 1:
            self._boundary = self._boundary or Boundary(pl_module)
            self._boundary.note(trainer)
        if self._validation_due:
            log_step(trainer)  # a run that is killed right behind the checkpoint has the row
            self._figures = _numbers(trainer.callback_metrics)
            self._begin(trainer)
        elif self._is_time(trainer, step):
            log_step(trainer)
            self._figures = _numbers(trainer.callback_metrics)
            if self.kept.lasting(step):  # is promised, and waits for slow storage
                self.saver.begin(trainer)
            else:
                self.saver.begin_unless_slow(trainer)
            self.pace.begin(step)
        else:
            self.saver.settle_if_over(trainer)

    def _is_time(self, trainer: pl.Trainer, step: int) -> bool:
        by_steps = any(n and step % n == 0 for n in (self.every_n_steps, self.keep_every_n_steps))
        return self.pace.due(trainer, step) or by_steps

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves with the new metrics, as the best if it is.

        Raises:
            ValueError: the metric to monitor was not logged.
        """
        if trainer.sanity_checking or trainer.state.fn != "fit" or trainer.fast_dev_run:
            return
        self._metrics = self._figures | _numbers(trainer.callback_metrics)
        self._validation_due = False
        if self._begin(trainer):
            self.saver.settle(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Has the last step on the disk, with its metrics.

        Raises:
            StorageFailed: it is not.
        """
        if trainer.fast_dev_run:
            return
        self.saver.settle(trainer)
        if self.saver.failures or self.saved_step != trainer.global_step:
            self._begin(trainer)
            self.saver.settle(trainer, final=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        wanted = isinstance(exception, Exception | KeyboardInterrupt) and not isinstance(exception, StorageFailed)
        if wanted and self._between_steps(trainer):
            self._save_on_the_way_out(trainer, exception)
        self.saver.leave()

    def _between_steps(self, trainer: pl.Trainer) -> bool:
        """Whether weights and optimizer are those of the last finished step, and this process decides alone."""
        finished = self._boundary is not None and not self._stepping and trainer.global_step == self._seen_step
        return finished and trainer.world_size == 1

    def _save_on_the_way_out(self, trainer: pl.Trainer, reason: BaseException) -> None:
        """What was trained since the last checkpoint; the step that is broken off has left no trace in it."""
        try:
            self.saver.settle(trainer)
            if self.saved_step == trainer.global_step:
                return
            self._boundary.put_back()
            self._leaving = True
            if self.save(trainer):
                log.warning("Checkpoints: step %d was saved on the way out, in %s", self.saved_step, self.last)
        except Exception as error:  # of the storage, of a device that no longer answers, of what must not be saved
            if not (isinstance(reason, NumericsFailed) and isinstance(error, NumericsFailed)):  # is said by the reason
                log.warning("Checkpoints: step %d could not be saved on the way out: %s", trainer.global_step, error)

    def save(self, trainer: pl.Trainer, final: bool = False) -> bool:
        """Has this step on the disk, on all ranks together; False where the storage failed and training can go on.

        Args:
            trainer: of the run.
            final: it does not go on.

        Raises:
            StorageFailed: it is not there, and there is no other save, or this was the third failure in a row.
        """
        if trainer.fast_dev_run:
            return True
        self.saver.settle(trainer)
        if self.saved_step != trainer.global_step:
            self._begin(trainer)
            self.saver.settle(trainer, final)
        return self.saved_step == trainer.global_step

    def _begin(self, trainer: pl.Trainer) -> bool:
        """Begins a save; after a validation, whether this is the best step so far."""
        self.pace.begin(trainer.global_step)
        return self.saver.begin(trainer, self._score() if self._metrics and self.monitor is not None else None)

    def _score(self) -> float:
        if self.monitor not in self._metrics:
            raise UserError(
                f"Checkpoints: the monitored metric must be logged in validation, got {self.monitor!r}; "
                f"logged are: {', '.join(sorted(self._metrics))}"
            )
        return self._metrics[self.monitor]


def saver_of(trainer: pl.Trainer) -> Checkpoints | None:
    """The callback that saves; None where it was taken out."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)), None)


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}
