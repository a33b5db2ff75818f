"""Writes beside training, one thing at a time."""

import threading
import time
from collections.abc import Callable


class Writer:
    """A thread that does one piece of work at a time; how it ended is asked for afterwards.

    Args:
        after: done in the thread after every piece of work that succeeded; its errors count as those of the work.
    """

    def __init__(self, after: Callable[[], None] | None = None) -> None:
        self._after = after
        self._thread: threading.Thread | None = None
        self.error: Exception | None = None  # that ended the latest piece of work
        self.seconds, self.bytes = 0.0, 0  # of the latest piece

    @property
    def busy(self) -> bool:
        """Whether a piece of work is being done."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], None], size: int = 0) -> None:
        """Begins a piece of work of so many bytes, after the one before it."""
        self.wait()
        self.error, self.bytes = None, size
        # No daemon: what was begun is finished, also where the program ends meanwhile.
        self._thread = threading.Thread(target=self._do, args=(work,), name="checkpoint writer", daemon=False)
        try:
            self._thread.start()
        except RuntimeError:  # no more threads for this user: then not beside training
            self._thread = None
            self._do(work)

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until nothing is being done, at most so long; returns whether that is so."""
        if self._thread is not None:
            self._thread.join(seconds)
        return not self.busy

    def _do(self, work: Callable[[], None]) -> None:
        begun = time.monotonic()
        try:
            work()
            if self._after is not None:
                self._after()
        except Exception as error:  # whatever it is, training need not end of it
            self.error = error
        self.seconds = time.monotonic() - begun
