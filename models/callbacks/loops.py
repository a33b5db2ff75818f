"""What reaches into Lightning's loops: the order of callbacks, and when it validates."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from conf.errors import UserError


def call_last(trainer: pl.Trainer, callback: Callback) -> None:
    """Moves a callback to the end of the trainer's list (a new list: Lightning is iterating over the old one)."""
    trainer.callbacks = [other for other in trainer.callbacks if other is not callback] + [callback]


def leave_signals_alone(trainer: pl.Trainer) -> None:
    """Keeps Lightning's handlers out, which save in the middle of a step, wait for other ranks, or requeue a job."""
    trainer._signal_connector.register_signal_handlers = _nothing
    # It asks rank 0 about SIGTERM before each batch, one synchronisation with the device; without them nobody needs it.
    if hasattr(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"):
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing


def _nothing() -> None:
    """Stands in for what Lightning would do."""


def log_step(trainer: pl.Trainer) -> None:
    """Logs the step that was just taken, now: it is saved or stopped at before Lightning's turn, which is then over."""
    connector = trainer._logger_connector
    if "update_train_step_metrics" in vars(connector):
        return
    connector.on_batch_end()
    connector.update_train_step_metrics()
    connector.update_train_step_metrics = lambda: vars(connector).pop("update_train_step_metrics", None)


def validate_at_the_end(trainer: pl.Trainer) -> None:
    """Lets Lightning validate after the last step too, where that is in the middle of an epoch or of several."""
    by_steps = 0 <= trainer.max_steps <= trainer.global_step
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
    if by_steps or (last_epoch and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch):
        trainer.should_stop = True  # it validates before it stops early, and then stops where it would have anyway
        if trainer.check_val_every_n_epoch is not None:
            trainer.check_val_every_n_epoch = 1


def validation_follows(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates right after this batch. It has no public name for its own decision."""
    fit_loop = trainer.fit_loop
    return trainer.enable_validation and fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher)


class Position(NamedTuple):
    """Where training stands: the epoch and the number in it of the next batch."""

    epoch: int
    batch: int


def position(trainer: pl.Trainer) -> Position:
    """Behind the batch that was just processed."""
    fit_loop = trainer.fit_loop
    epoch, batches = fit_loop.epoch_progress.current.processed, fit_loop.epoch_loop.batch_progress
    return Position(epoch + 1, 0) if batches.is_last_batch else Position(epoch, batches.current.ready)


def go_on(trainer: pl.Trainer, checkpoint: dict[str, Any], saved: Iterable[int] | None) -> Position | None:
    """Places the loops in a checkpoint, before Lightning restores them, where the data goes on.

    Args:
        checkpoint: as it was loaded; its loops are written anew, and how long a run was allowed to take is forgotten:
            `max_time` is that of each start.
        saved: the position that was saved, for data that keeps none.

    Raises:
        ValueError: the run is further than it shall go.
    """
    start = getattr(trainer.datamodule, "start_epoch", None)
    if start is None and saved is None:
        return None
    at = Position(*saved) if start is None else Position(start, trainer.datamodule.start_batch)
    step = checkpoint["global_step"]
    stands = f"the run stands at step {step}, {at.epoch} epochs and {at.batch} batches"
    remedy = "raise it, or begin another run.name with resume=<an older checkpoint>"
    if trainer.max_epochs not in (None, -1) and at > (trainer.max_epochs, 0):
        raise UserError(f"resume: {stands}, got trainer.max_epochs={trainer.max_epochs}; {remedy}")
    if 0 <= trainer.max_steps < step:
        raise UserError(f"resume: {stands}, got trainer.max_steps={trainer.max_steps}; {remedy}")
    stand_at(checkpoint["loops"]["fit_loop"], at, step)
    checkpoint["callbacks"].pop("Timer", None)
    return at


def stand_at(fit_loop: dict[str, Any], at: Position, step: int) -> None:
    """Writes a place into the state of Lightning's loops, in the one form that it goes on from exactly.

    What it saves itself depends on the hook in which it is saved, and is one epoch behind after two restarts at the end
    of an epoch. Here a place is either within an epoch, all batches before it finished, or between two epochs.
    """
    begun = at.epoch + (at.batch > 0)
    epochs = {"ready": begun, "started": begun, "processed": at.epoch, "completed": at.epoch}
    fit_loop["epoch_progress"] |= {"total": dict(epochs), "current": dict(epochs)}
    batches = fit_loop["epoch_loop.batch_progress"]
    total = batches["total"]["ready"]  # all of them are processed: it is saved behind a batch
    batches |= {"total": _all(total), "current": _all(at.batch), "is_last_batch": False}
    fit_loop["epoch_loop.val_loop.batch_progress"] |= {"total": _all(0), "current": _all(0), "is_last_batch": False}
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step


def _all(number: int) -> dict[str, int]:
    return dict.fromkeys(("ready", "started", "processed", "completed"), number)


def begin_between_epochs(trainer: pl.Trainer) -> None:
    """Where training goes on between two epochs nothing is restarted, which Lightning believes of a run by steps."""
    fit_loop = trainer.fit_loop
    if fit_loop.epoch_progress.current.ready == fit_loop.epoch_progress.current.processed:
        fit_loop._restarting = False
        fit_loop.epoch_loop.restarting = False


def validation_is_due(trainer: pl.Trainer) -> bool:
    """Whether a run that never stopped would have validated where this one goes on; it may go on longer than it would.

    Otherwise a validation that is owed was that of an end which is none any more.
    """
    fit_loop, every, interval = trainer.fit_loop, trainer.check_val_every_n_epoch, trainer.val_check_batch
    epochs, batches = fit_loop.epoch_progress.current, fit_loop.epoch_loop.batch_progress
    if fit_loop.done or interval in (None, math.inf):
        return True
    if every is None:
        return batches.total.ready % interval == 0
    if epochs.ready == epochs.processed:
        return epochs.processed % every == 0
    return epochs.ready % every == 0 and batches.current.ready % interval == 0


def end_all(trainer: pl.Trainer, owed: Callable[[], bool]) -> None:
    """Lets a run that has nothing left to train do what is `owed` at its end: Lightning leaves it before any hook."""

    class FitLoop(type(trainer.fit_loop)):
        @property
        def skip(self) -> bool:  # what Lightning asks once, before it begins
            skip = super().skip
            if skip and self.max_batches and trainer.limit_train_batches:
                _end(self, owed())
            return skip

    trainer.fit_loop.__class__ = FitLoop


def _end(fit_loop: Any, owes: bool) -> None:
    epochs = fit_loop.epoch_progress.current
    if owes:
        fit_loop.on_run_start()
    epochs.processed = epochs.completed = epochs.ready  # as Lightning counts an epoch that is left by its steps
    if owes:
        fit_loop.on_run_end()


def validate_now(trainer: pl.Trainer) -> None:
    """Runs the validation that a stopped run still owed, as a part of the epoch that it belongs to.

    Lightning itself would leave it out on resume, or count it to the next epoch.
    """
    fit_loop = trainer.fit_loop
    progress, epoch_loop = fit_loop.epoch_progress.current, fit_loop.epoch_loop
    between = progress.ready == progress.processed
    progress.processed = progress.completed = progress.processed - between
    epoch_loop._batches_that_stepped = trainer.global_step - 1
    epoch_loop.val_loop.restarting = False
    trainer.validating = True
    epoch_loop.val_loop.run()
    trainer.training = True
    epoch_loop._batches_that_stepped = trainer.global_step
    progress.processed = progress.completed = progress.processed + between
