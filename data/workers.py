"""Processes that read images: they outlive a signal to the whole job, hold nothing of the run, and end with it.

A scheduler sends a signal to every process of a job, and it is the training process that answers it. Its workers have
no state worth an ending of their own: they are killed when the run is over, and by the kernel when it dies.
"""

import atexit
import contextlib
import ctypes
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Iterable, Iterator

from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from conf.stops import ASKING

DEAF = {*ASKING, signal.SIGINT}
LAST_WAIT = 1.0  # seconds for a killed process to go; one that waits for a file server in the kernel does not
_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Signals wait inside, so that none meets a process that was just forked and has no handlers of its own yet."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin(worker: int) -> None:
    """What a worker does first: it stops listening to what is meant for its parent, and dies with that."""
    signal.set_wakeup_fd(-1)  # the parent's: it would take a signal to a worker for its own
    for number in DEAF:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, DEAF)
    with contextlib.suppress(OSError, AttributeError):  # not Linux: a worker asks for its parent every five seconds
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)


def end(loader: DataLoader) -> None:
    """Ends the workers of a loader at once, also those that do not react; the loader can be iterated anew."""
    iterator, loader._iterator = loader._iterator, None
    if not hasattr(iterator, "_workers") or iterator._shutdown:
        return
    iterator._shutdown = True  # a lock that a killed worker held would be waited for
    signal_handling._remove_worker_pids(id(iterator))  # or their ends would be raised as errors
    iterator._worker_pids_set = False
    _kill(iterator._workers)
    for queue in (*iterator._index_queues, iterator._worker_result_queue):
        queue.cancel_join_thread()
    if hasattr(iterator, "_pin_memory_thread"):
        iterator._pin_memory_thread_done_event.set()
        iterator._pin_memory_thread.join(6 * LAST_WAIT)  # it looks every five seconds


def _kill(processes: Iterable[multiprocessing.process.BaseProcess]) -> None:
    """Kills, and waits a moment; a process that cannot be ended is left, for Python's exit would wait for ever."""
    processes = list(processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.join(LAST_WAIT)
        if process.is_alive():
            multiprocessing.process._children.discard(process)


@atexit.register  # before multiprocessing's own, which asks politely and waits
def _end_all() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    _kill(child for child in multiprocessing.active_children() if child.daemon)
