"""How a job of several processes ends when one of them fails: soon, with that one's error, said once."""

import io
import re
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_only

from conf.errors import RunFailed, UserError
from conf.names import short
from models.engines.distributed import Distributed
from models.engines.watch import TICK, Failure, Watch, write_error

# what operations that wait for other processes raise when these do not come
_WAITING = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed out|broken pipe|connect\(\)", re.IGNORECASE)


@contextmanager
def together(trainer: pl.Trainer, folder: Path | None) -> Iterator[None]:
    """Around what all processes do together.

    The error of the process that has failed first becomes that of the job, with its status, in the words of one
    process; each leaves `errors/rank<r>.json` with its own traceback.

    Args:
        trainer: of the run or the evaluation.
        folder: of the run, for those files; None for none.

    Raises:
        RunFailed: another process has failed.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, Distributed):
        yield
        return
    strategy.folder, failed = folder, False
    try:
        yield
    except Exception as error:
        if strategy.watch is None:
            raise
        failed = True
        _end(strategy.watch, error, strategy._timeout.total_seconds())
    finally:
        strategy.end_alone()
        if strategy.watch is not None:
            if failed and strategy.watch.rank == 0:
                strategy.wait_for_the_others()
            strategy.watch.stop()


def _end(watch: Watch, error: Exception, timeout: float) -> None:
    """Says whose failure it was, and raises what this process ends with."""
    waiting = isinstance(error, dist.DistError) or (
        not isinstance(error, UserError) and isinstance(error, RuntimeError) and _WAITING.search(str(error))
    )
    failure = _blamed(watch, timeout) if waiting else None
    watch.leave()
    trace = "".join(traceback.format_exception(error))
    if failure is None or failure.rank == watch.rank:
        status = error.status if isinstance(error, UserError) else 1
        lines = str(error).splitlines() or [""]
        reason = f"failed with {type(error).__name__}: {lines[0]}"
        watch.fail(Failure(watch.rank, socket.gethostname(), reason, watch.step(), status))
        write_error(watch.folder, watch, f"{type(error).__name__}: {error}", trace)
        if watch.rank == 0:
            raise error
        raise SystemExit(status) from None
    told = failure.told(watch.world)
    write_error(watch.folder, watch, told, trace)
    told += f"; {_advice(watch, failure)}"
    if watch.rank == 0:
        ended = RunFailed(told)
        ended.status = failure.status
        raise ended from None
    if watch.speaks:
        print(told, file=sys.__stderr__, flush=True)
    raise SystemExit(failure.status) from None


def _blamed(watch: Watch, timeout: float) -> Failure | None:
    """Who has failed: as somebody says, or the first that did not come where the others waited."""
    if (known := watch.found(3 * TICK)) is not None:
        return known
    missing = watch.waited()
    if (known := watch.found(0.1)) is not None:
        return known
    if not missing:
        return None
    host, step = watch.place(missing[0])
    reason = f"did not come within {timeout:g} s (trainer.timeout)"
    watch.fail(Failure(missing[0], host, reason, step))
    return watch.failure


def _advice(watch: Watch, failure: Failure) -> str:
    if watch.folder is None:
        return "start it again"
    place = short(watch.folder / "errors" / f"rank{failure.rank}.json")
    return f"{place} has its traceback, where it could write one; the same command goes on from the last checkpoint"


@contextmanager
def apart(folder: Path) -> Iterator[None]:
    """Only process 0 prints; what another one says is in `errors/rank<r>.log` of the folder."""
    rank = rank_zero_only.rank or 0
    if rank == 0:
        yield
        return
    with _Later(folder / "errors" / f"rank{rank}.log") as file, redirect_stdout(file), redirect_stderr(file):
        yield


class _Later(io.TextIOBase):
    """A file that is made when something is written into it."""

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, None

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file: IO[str] | None = self.path.open("a", buffering=1)
            self._file.write(text)
        except OSError:  # a side output
            pass
        return len(text)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()
