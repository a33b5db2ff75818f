"""What reaches into Lightning's loops: the order of callbacks, and when it validates."""

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


def call_last(trainer: pl.Trainer, callback: Callback) -> None:
    """Moves a callback to the end of the trainer's list (a new list: Lightning is iterating over the old one)."""
    trainer.callbacks = [other for other in trainer.callbacks if other is not callback] + [callback]


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


def validate_now(trainer: pl.Trainer) -> None:
    """Runs the validation that a stopped run still owed; Lightning itself would leave it out on resume."""
    validation = trainer.fit_loop.epoch_loop.val_loop
    validation.restarting = False
    trainer.validating = True
    validation.run()
    trainer.training = True
