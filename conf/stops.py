"""Signals that ask to stop, and statuses of what was stopped; a command that has not begun ends with its status."""

import contextlib
import signal
import sys
import threading
from types import FrameType

PREEMPTED = 75  # sysexits' EX_TEMPFAIL: start the same command again
INTERRUPTED = 130  # what shells report for Ctrl-C
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)  # Ctrl-C is Python's own


def answer() -> None:
    """From now on such a signal ends the process with status 75; a run that trains has handlers of its own."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in ASKING:
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup has SIGHUP ignored
            signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # no terminal, or in the middle of a line
        print(f"stopped by {signal.Signals(number).name} before training began", file=sys.stderr, flush=True)
    raise SystemExit(PREEMPTED)
