"""Signals that ask to stop, and statuses of what was stopped; a command that has not begun ends with its status."""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn, TextIO

PREEMPTED = 75  # sysexits' EX_TEMPFAIL: start the same command again
INTERRUPTED = 130  # what shells report for Ctrl-C
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)  # Ctrl-C is Python's own
HEARD = 1.0  # seconds in which a terminal takes the last line of a process


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


def leave(text: str, status: int, stream: TextIO) -> NoReturn:
    """Ends the process where it stands; a terminal that takes no line, or a reader that is stuck, does not hold it."""

    def say() -> None:
        with contextlib.suppress(Exception):
            print(text, file=stream, flush=True)

    with contextlib.suppress(RuntimeError):  # no more threads
        speaking = threading.Thread(target=say, daemon=True)
        speaking.start()
        speaking.join(HEARD)
    os._exit(status)


def ended_by(status: int) -> str:
    """How a process has ended, in words: "was killed by SIGKILL", "ended with status 3"."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
