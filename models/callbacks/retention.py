"""Which checkpoints of a run stay: the best by a metric, the last, some old ones, and those of every so many steps."""

import contextlib
import logging
import math
from pathlib import Path
from typing import NamedTuple

from conf.errors import UserError
from models.checkpoints.format.directory import read_manifest, step_directories, verify
from models.checkpoints.format.write import point, remove_checkpoint

log = logging.getLogger(__name__)


class Ranked(NamedTuple):
    """A step and its score."""

    score: float
    step: int


class Retention:
    """Ranks steps by their scores, moves the pointers `last` and `best`, and deletes what is no longer kept.

    Only what this process has written or verified is deleted: a checkpoint that cannot be read stays where it is.

    Args:
        keep: how many old checkpoints stay besides all others named here.
        keep_every_n_steps: checkpoints of these steps are never deleted; None: no such ones.
        top_k: how many of the best stay; the first is `best`. Of equal scores the earlier is the better.
        mode: "max" or "min".
    """

    def __init__(self, keep: int = 1, keep_every_n_steps: int | None = None, top_k: int = 1, mode: str = "max") -> None:
        self.keep, self.keep_every_n_steps, self.top_k, self.mode = keep, keep_every_n_steps, top_k, mode
        self.ranked: tuple[Ranked, ...] = ()
        self._sound: set[Path] = set()  # written or verified by this process
        self._damaged: set[Path] = set()

    @property
    def best(self) -> Ranked | None:
        """The best of all steps so far."""
        return self.ranked[0] if self.ranked else None

    def rank(self, score: float, step: int) -> bool:
        """Takes a step into the ranking, unless its score is NaN or too bad; returns whether it is the best."""
        others = [entry for entry in self.ranked if entry.step != step]
        if not math.isnan(score):
            others.append(Ranked(score, step))
        sign = -1 if self.mode == "max" else 1
        self.ranked = tuple(sorted(others, key=lambda entry: (sign * entry.score, entry.step))[: self.top_k])
        return self.best is not None and self.best.step == step

    def arrange(self, directory: Path, last: Path) -> None:
        """Moves the pointers to the newest checkpoint and to the best.

        Raises:
            OSError: a pointer could not be moved.
        """
        point(directory / "last", last)
        best = step_directories(directory).get(self.best.step) if self.best is not None else None
        if best is not None:
            point(directory / "best", best)

    def found(self, directory: Path, source: Path) -> set[int]:
        """The ranked steps that are in a folder.

        Args:
            directory: the folder; another run may have left checkpoints of the same steps in it.
            source: where the ranking comes from; if that is another folder, the files must be the same.
        """
        here, there = step_directories(directory), step_directories(source)
        steps = {entry.step for entry in self.ranked} & here.keys()
        if directory.resolve() == source.resolve():
            return steps
        return {step for step in steps & there.keys() if _files(here[step]) == _files(there[step])}

    def delete(self, directory: Path, last: Path) -> None:
        """Deletes what is no longer kept, now that `last` was written; what cannot be deleted is only said."""
        self._sound.add(last)
        self._damaged.discard(last)
        kept = {entry.step for entry in self.ranked}
        steps = step_directories(directory)
        old = [path for step, path in steps.items() if path != last and step not in kept and not self.lasting(step)]
        for path in [path for path in reversed(old) if self._is_sound(path)][self.keep :]:
            try:
                with contextlib.suppress(FileNotFoundError):  # somebody was faster
                    remove_checkpoint(path)
            except OSError as error:
                log.warning("Checkpoints: an old one could not be deleted: %s", error)

    def lasting(self, step: int) -> bool:
        """Whether the checkpoint of this step is one that is never deleted."""
        return bool(self.keep_every_n_steps) and step % self.keep_every_n_steps == 0

    def _is_sound(self, path: Path) -> bool:
        """Whether a checkpoint may be deleted; of an earlier start it is read once."""
        if path not in self._sound and path not in self._damaged:
            try:
                verify(path)
                self._sound.add(path)
            except (UserError, OSError) as error:  # OSError: of a folder that is somebody else's
                log.warning("Checkpoints: a damaged one stays until you delete it: %s", error)
                self._damaged.add(path)
        return path in self._sound


def _files(path: Path) -> object:
    """What is in a checkpoint, by its checksums; equal to nothing else where that cannot be read."""
    try:
        return read_manifest(path)["files"]
    except (UserError, OSError):
        return object()
