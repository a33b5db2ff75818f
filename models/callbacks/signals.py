"""Signals that ask a run to stop: noted while it trains, obeyed at once while there is nothing to save, insisted on.

A handler only runs when Python gets control. A step that hangs in a kernel or in a collective never gives it back, so a
thread beside it reads the signals too (`signal.set_wakeup_fd`), and ends the process where the handler cannot.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch.distributed as dist

from conf.errors import UserError
from conf.stops import ASKING, INTERRUPTED, PREEMPTED, leave

SIGNALS = (*ASKING, signal.SIGINT)
ONCE = 2.0  # seconds in which further signals are the same request: a group gets one from each process above it
ECHO = 0.1  # seconds in which a second Ctrl-C is none: coreutils' `timeout` sends two
PATIENCE = 3.0  # seconds that a step has after a second request
GRACE = 300.0  # seconds without a finished batch after the first


class Stopped(BaseException):
    """Training was stopped on request, after saving; the entry point exits with `status`.

    No `Exception`: what guards against the failures of a part must not swallow it.
    """

    def __init__(self, status: int, message: str, said: bool = True) -> None:
        super().__init__(message)
        self.status, self.said = status, said


class Requests:
    """The signals that asked this process to stop.

    Attributes:
        looked_at: a loop asks for `number` where it can stop, so the handler raises nothing.
        saving: a checkpoint is being written, which a second request waits for.
        stopped: the run is ending because of them, its step saved.
        unsaved: a run trains, and nothing saves it at a request (`callbacks.preemption=null`).
        alive: when the last batch was finished, on the monotonic clock.
        grace: seconds without a finished batch after which a request is insisted on.
        others: processes that end with this one.
    """

    def __init__(self) -> None:
        self.looked_at = self.saving = self.stopped = self.unsaved = False
        self.alive, self.grace = 0.0, GRACE
        self.others: Iterable[Any] = ()
        self._received: dict[int, float] = {}  # when they came first
        self._previous: dict[int, Any] = {}
        self._process, self._raised = os.getpid(), False
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        # of the thread alone
        self._first = self._again = 0.0
        self._seen: dict[int, float] = {}

    @property
    def number(self) -> int:
        """The signal that counts; 0 where none came."""
        return max(self._received, default=0)

    @property
    def status(self) -> int:
        return INTERRUPTED if self.number == signal.SIGINT else PREEMPTED

    def listen(self) -> None:
        """Installs the handlers, and the thread for a process that hangs; in a main thread only, as Python demands."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        self._process = os.getpid()
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._previous_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._previous[number] = signal.signal(number, self._note)

    def close(self) -> None:
        """Gives back what `listen` took."""
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
        if self._pipe is not None:
            signal.set_wakeup_fd(self._previous_fd)
            os.write(self._pipe[1], b"\0")
            self._thread.join()
            for end in self._pipe:
                os.close(end)
            self._pipe = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The handler. A second Ctrl-C ends the process; where nobody looks, the first request ends the run."""
        if os.getpid() != self._process:
            return  # a fork that has no handlers of its own yet
        now = time.monotonic()
        if now - self._received.setdefault(number, now) > ECHO and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        if (alone or self.unsaved) and not self.looked_at and not self._raised:
            self._raised = self.stopped = True
            lost = "; what came behind the last checkpoint is lost (callbacks.preemption=null)" if self.unsaved else ""
            raise Stopped(self.status, f"stopped by {signal.Signals(number).name}{lost}", said=False)

    def _watch(self) -> None:
        """The thread: reads every signal as it comes, and looks at the clock from the first one on."""
        while True:
            ready, _, _ = select.select([self._pipe[0]], [], [], 0.25 if self._first else None)
            now = time.monotonic()
            if ready:
                numbers = os.read(self._pipe[0], 64)
                if 0 in numbers:  # of `close`
                    return
                for number in set(numbers).intersection(SIGNALS):
                    self._count(number, now)
            if self._overdue(now):
                self._end()

    def _count(self, number: int, now: float) -> None:
        self._first = self._first or now
        twice = now - self._seen.setdefault(number, now) > ECHO and number == signal.SIGINT
        # the kernel repeats SIGXCPU every second by itself
        if not self._again and (twice or (now - self._first > ONCE and number != signal.SIGXCPU)):
            self._again = now

    def _overdue(self, now: float) -> bool:
        if not self._first:
            return False
        if self._again and not self.saving and now - self._again > PATIENCE:
            return True
        return now - max(self._first, self.alive) > self.grace

    def _end(self) -> None:
        """Ends the process where it stands: the last checkpoint stays."""
        number = max(self._seen)
        frame = sys._current_frames().get(threading.main_thread().ident)
        where = "" if frame is None else f" in {frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"
        lost = "what comes behind it is left out" if self.stopped else "the step is lost, the last checkpoint stays"
        text = f"stopped by {signal.Signals(number).name} while the process hung{where}; {lost}"
        for process in self.others:
            with contextlib.suppress(OSError):
                process.kill()
        status = INTERRUPTED if number == signal.SIGINT else PREEMPTED
        leave(f"{text}: start the same command again", status, sys.stderr)


_LISTENING: list[Requests] = []


def requests() -> Requests | None:
    """Those of the run of this process; None outside of one."""
    return _LISTENING[-1] if _LISTENING else None


@contextlib.contextmanager
def listening() -> Iterator[Requests]:
    """Signals inside end the process with their status: at once, or as `Preemption` does while a run trains."""
    found = Requests()
    _LISTENING.append(found)
    try:
        found.listen()
        yield found
    except Stopped as stop:
        if not stop.said:
            with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
                print(f"{stop}; to go on, give the same command again", file=sys.stderr, flush=True)
        raise SystemExit(stop.status) from None
    except Exception as error:
        if not found.number or isinstance(error, UserError):
            raise
        # the signal went to all that the run had started, such as what compiles, and this is what came of it
        with contextlib.suppress(OSError, ValueError):
            name, reason = signal.Signals(found.number).name, str(error).partition("\n")[0]
            text = f"stopped by {name}, and then {type(error).__name__}: {reason}; the last checkpoint stays"
            print(f"{text}: start the same command again", file=sys.stderr, flush=True)
        raise SystemExit(found.status) from None
    finally:
        found.looked_at = True  # what comes now finds the run over
        _LISTENING.remove(found)
        found.close()
