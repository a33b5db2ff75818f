"""When a save is due by the clock, on all ranks at the same step."""

import time

import pytorch_lightning as pl

from conf.errors import UserError


class Pace:
    """Rank 0 has the clock. It says beforehand at which step all ranks ask it again, by how long a step takes.

    Args:
        minutes: between saves; None for no saves by the clock.
    """

    def __init__(self, minutes: float | None) -> None:
        if minutes is not None and (isinstance(minutes, bool) or not isinstance(minutes, int | float) or minutes <= 0):
            raise UserError(f"Checkpoints: every_minutes must be a number above 0 or null, got {minutes!r}")
        self.minutes = minutes
        self._step, self._ask, self._began = 0, 0, time.monotonic()

    def begin(self, step: int) -> None:
        """A save was begun at this step."""
        self._step, self._ask, self._began = step, step + 1, time.monotonic()

    def due(self, trainer: pl.Trainer, step: int) -> bool:
        """Whether to save now."""
        if self.minutes is None or step < self._ask:
            return False
        passed, left = time.monotonic() - self._began, 0
        left = self.minutes * 60 - passed
        # half of the steps that fit: they may become slower; one process asks itself at each
        steps = int(left / passed * (step - self._step) / 2) if trainer.world_size > 1 and passed > 0 else 0
        due, self._ask = trainer.strategy.broadcast((left <= 0, step + max(steps, 1)), src=0)
        return due
