"""Saves of a run: begun on all ranks together, written beside training, and known to all when they are over."""

import logging
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl

from conf.errors import StorageFailed
from models.callbacks.retention import Ranked, Retention
from models.callbacks.writer import Writer
from models.checkpoints.format.directory import step_name

log = logging.getLogger(__name__)


class Pending(NamedTuple):
    """A save whose end is not known yet, and the ranking that holds if it fails."""

    step: int
    ranked: tuple[Ranked, ...]


class Saver:
    """Begins saves and learns how they end; at most one is under way.

    Args:
        kept: which checkpoints stay.
    """

    MAX_FAILURES = 3
    PATIENCE = 10.0  # seconds that training stands still for a save while the one before is still being written

    def __init__(self, kept: Retention) -> None:
        self.kept = kept
        self.directory: Path | None = None
        self.writes = False  # whether this process does
        self.saved_step = -1  # of the newest checkpoint that all ranks know of; -1: none
        self.failures = 0
        self._pending: Pending | None = None
        self._writer = Writer(after=self._arrange)
        self._error: OSError | None = None
        self._step = -1  # that is being written
        self._pause = 0.0
        self._said: set[str] = set()

    @property
    def last(self) -> Path | None:
        """The newest checkpoint on the disk, as far as this process knows; waits for what is being written."""
        step = self.saved_step
        if self._pending is not None and self._writer.wait() and not self._failed():
            step = self._pending.step
        return None if step < 0 else self.directory / step_name(step)

    def begin(self, trainer: pl.Trainer, score: float | None = None) -> bool:
        """Begins to save this step, on all ranks together; with a score, whether it is the best so far.

        Raises:
            StorageFailed: the save before was the third failure in a row.
        """
        self.settle(trainer)
        before, self._step = self.kept.ranked, trainer.global_step
        best = score is not None and self.kept.rank(score, self._step)
        began = time.monotonic()
        try:
            path = self.directory / step_name(self._step)
            trainer.save_checkpoint(path, weights_only=False, storage_options=self._writer)
        except OSError as error:  # of a plugin that writes at once
            self._error = error
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other ranks wait for this one
        self._pending, self._pause = Pending(self._step, before), time.monotonic() - began
        return best

    def begin_unless_slow(self, trainer: pl.Trainer) -> None:
        """A save that can be left out: where the one before takes long, training does not stand still for it."""
        if trainer.strategy.broadcast(self._writer.wait(self.PATIENCE), src=0):
            self.begin(trainer)
        else:
            self._say_once(
                logging.WARNING,
                f"Checkpoints: the save of step {self._step} in {self.directory} is still being written; "
                "saves are left out where the storage is so slow",
            )

    def settle(self, trainer: pl.Trainer, final: bool = False) -> None:
        """Waits until the save that was begun is over, and has every rank know how it ended.

        Args:
            trainer: of the run.
            final: there will be no other one.

        Raises:
            StorageFailed: it failed, and there is no other one, or the two before failed too.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        error = self._result()
        if not trainer.strategy.broadcast(error is not None, src=0):
            self.failures, self.saved_step = 0, pending.step
            self._report()
            return
        self.kept.ranked = pending.ranked
        self.failures += 1
        message = self._failure(pending.step, error)
        if final or self.failures >= self.MAX_FAILURES:
            lost = "the run ends without it" if final else f"{self.failures} saves in a row failed"
            left = f"; the same command goes on from {self.last}" if self.last else ""
            raise StorageFailed(f"{message}; {lost}: free space or mend the folder{left}")
        if self.writes:
            log.warning("%s; older checkpoints stay and training goes on", message)

    def settle_if_over(self, trainer: pl.Trainer) -> None:
        """The same, of a single process, where it does not have to wait."""
        if trainer.world_size == 1 and not self._writer.busy:
            self.settle(trainer)

    def leave(self) -> None:
        """Waits until nothing is being written, and says what failed; ranks may be elsewhere."""
        error = self._result() if self._pending is not None else None
        if error is not None:
            log.warning("%s", self._failure(self._pending.step, error))

    def _failed(self) -> bool:
        return self._error is not None or self._writer.error is not None

    def _result(self) -> Exception | None:
        self._writer.wait()
        error, self._error, self._writer.error = self._error or self._writer.error, None, None
        return error

    def _arrange(self) -> None:
        """In the thread, after a checkpoint was written; of processes that each write a share, on the first."""
        if not self.writes:
            return
        path = self.directory / step_name(self._step)
        self.kept.arrange(self.directory, path)
        self.kept.delete(self.directory, path)

    def _failure(self, step: int, error: Exception | None) -> str:
        reason = getattr(error, "strerror", None) or error or "an error on rank 0"
        return (
            f"Checkpoints: step {step} could not be saved in {self.directory} ({reason}, "
            f"{self._writer.bytes} bytes needed, {free_bytes(self.directory)} bytes free)"
        )

    def _report(self) -> None:
        size, seconds = self._writer.bytes / 2**20, self._writer.seconds
        cost = f"training pauses {self._pause:.2f} s for each, written beside it in {seconds:.2f} s"
        self._say_once(logging.INFO, f"checkpoints: {size:.1f} MiB, {cost}")

    def _say_once(self, level: int, text: str) -> None:
        kind = logging.getLevelName(level)
        if self.writes and kind not in self._said:
            self._said.add(kind)
            log.log(level, "%s", text)


def free_bytes(directory: Path) -> int | str:
    """What is free where this folder is, or will be; "unknown" where the storage does not say."""
    try:
        while not directory.exists():
            directory = directory.parent
        return shutil.disk_usage(directory).free
    except OSError:
        return "unknown"
