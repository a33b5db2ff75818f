"""Standard output and error of a command: whoever reads them may go away, or have no room, and the command goes on."""

import contextlib
import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

PIECE = 1024  # letters: at most 4096 bytes, which a pipe that has room takes at once


class Kept:
    """A stream whose failures end nothing: what cannot be written is left out.

    Attributes:
        lost: whether something was.
        patience: seconds for which a reader that reads nothing (a stopped `less`, a frozen ssh) is waited for, once;
            None for ever.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.lost, self.patience = stream, False, None
        self._stalled = False

    def write(self, text: str) -> int:
        if self.patience is None:
            self._attempt(self._stream.write, text)
            return len(text)
        for start in range(0, len(text), PIECE):
            if not self._has_room():
                self.lost = True
                break
            self._attempt(self._stream.write, text[start : start + PIECE])
            self._attempt(self._stream.flush)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except ValueError:
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, call: Callable[..., Any], *args: Any) -> None:
        try:
            call(*args)
        except UnicodeEncodeError as error:  # a terminal that has no boxes, or no umlauts
            self._attempt(call, *(arg.encode(error.encoding, "replace").decode(error.encoding) for arg in args))
        except BrokenPipeError:  # the reader is gone for ever
            self.lost = True
            self.give_up()
        except (OSError, ValueError):  # no room, a terminal that was closed; a stream that was
            self.lost = True

    def _has_room(self) -> bool:
        """Whether so much can be written at once without waiting; also where that cannot be known."""
        try:
            look = select.poll()
            look.register(self._stream.fileno(), select.POLLOUT)
            self._stalled = not look.poll(0 if self._stalled else int(1000 * self.patience))
        except (OSError, ValueError, AttributeError):  # no file, or a system without poll
            return True
        return not self._stalled

    def give_up(self) -> None:
        """Lets everything go nowhere, so that Python has nothing to complain of when it ends."""
        with contextlib.suppress(OSError, ValueError):
            _to_nowhere(self._stream.fileno())
            self._stream.flush()


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within it, nothing that is printed can fail; neither can what Python does with the streams at its end."""
    streams = sys.stdout, sys.stderr
    _open_missing()
    out, err = (Kept(stream) if stream is not None else Kept(_nowhere()) for stream in streams)
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in (out, err):
            stream.lost = False
            stream.flush()
            if stream.lost:
                stream.give_up()


def _open_missing() -> None:
    """Takes the numbers of streams that were closed from the start, before the first file of ours gets one of them."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _to_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
