"""The processes that read images, found dead or late within a second.

torch's own iterator raises the death of a process wherever the main one happens to be; here it is an error of the batch
that was asked for, and says which one the process was at (`data.loader` starts them again, `data.workers` ends them).
"""

import signal
import threading
import time
import weakref
from multiprocessing.connection import wait
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from conf.stops import ended_by

POLL = 1.0  # seconds between looks at the processes


class Gone(RuntimeError):
    """A process died, or gave no batch in time.

    Attributes:
        batch: the number of the batch, from the start of this iteration, that it was at.
        why: in words.
        late: it is still there.
    """

    def __init__(self, batch: int, why: str, late: bool) -> None:
        super().__init__(why)
        self.batch, self.why, self.late = batch, why, late


class Readers(_MultiProcessingDataLoaderIter):
    """torch's iterator over the processes of a loader."""

    def __init__(self, loader: DataLoader) -> None:
        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD) if main else None
        self.since: float | None = None  # when it began to wait
        self.late = False
        super().__init__(loader)
        if self._timeout > 0:
            threading.Thread(target=_watch, args=(weakref.ref(self), self._timeout), daemon=True).start()
        if main:  # torch's handler would raise in the middle of a step
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)

    def _get_data(self) -> Any:
        """The next thing that a process has sent.

        Raises:
            Gone: one died, or `timeout` seconds have passed.
        """
        self.since = time.monotonic()
        try:
            while not self.late:
                if self._pin_memory and not self._pin_memory_thread.is_alive():
                    raise RuntimeError("the thread that pins memory ended")
                found, data = self._try_get_data(POLL)
                if found:
                    return data
        except (RuntimeError, OSError, EOFError) as error:
            if not self.late:
                raise self._dead() or error from error
        finally:
            self.since = None
        raise Gone(self._rcvd_idx, f"gave no batch for {self._timeout:g} seconds", late=True)

    def _dead(self) -> Gone | None:
        """The first process that has ended, and what it was at; None where all are there."""
        ending = wait([process.sentinel for process in self._workers], POLL)
        for number, process in enumerate(self._workers):
            if process.sentinel in ending:
                process.join(POLL)  # its files are closed a moment before it is gone
            if process.exitcode is not None:
                mine = [index for index, task in self._task_info.items() if task[0] == number and len(task) == 1]
                return Gone(min(mine, default=self._rcvd_idx), ended_by(process.exitcode), late=False)
        return None


def _watch(reference: "weakref.ref[Readers]", timeout: float) -> None:
    """Kills processes that give no batch in time: the main one may be in the middle of what one of them sends."""
    while (readers := reference()) is not None and not readers._shutdown:
        if readers.since is not None and time.monotonic() - readers.since > timeout:
            readers.late = True
            for process in readers._workers:
                process.kill()
            return
        del readers
        time.sleep(min(POLL, timeout / 4))
