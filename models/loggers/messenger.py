"""A process beside the run that is told things and never waited for, but at the end, for a limited time."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LIMIT = 32 * 2**20  # bytes that wait for a process which does not read them


class Messenger:
    """Starts a program of Python's and talks to it in lines of JSON.

    Args:
        program: the file.

    Attributes:
        lost: whether it is told nothing any more: it has ended, or has not listened for too long.
    """

    def __init__(self, program: Path) -> None:
        # a session of its own: what is sent to the run's process group is meant for the run
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
        )
        for pipe in (self._process.stdin, self._process.stdout):
            os.set_blocking(pipe.fileno(), False)
        self._owner = os.getpid()
        self._waiting, self._heard, self.lost = bytearray(), b"", False

    def tell(self, message: Any) -> None:
        """Sends what can be sent now; the rest goes with a later message."""
        if self.lost or os.getpid() != self._owner:  # a loader process is not the run
            return
        self._waiting += json.dumps(message, default=str).encode() + b"\n"
        self._send()
        self.lost = self.lost or len(self._waiting) > LIMIT

    def heard(self) -> list[dict[str, Any]]:
        """What it has said since the last time."""
        self._listen()
        *lines, self._heard = self._heard.split(b"\n")
        return [found for line in lines if isinstance(found := _read(line), dict)]

    def close(self, seconds: float) -> bool:
        """Waits for its end so long, then ends it and what it has started; whether it ended by itself."""
        if os.getpid() != self._owner:
            return False
        end = time.monotonic() + seconds
        room = select.poll()
        room.register(self._process.stdin, select.POLLOUT)
        while self._waiting and not self.lost and (left := end - time.monotonic()) > 0:
            room.poll(1000 * min(left, 0.5))
            self._send()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(max(end - time.monotonic(), 0))
            ended = True
        except subprocess.TimeoutExpired:
            self._end()
            ended = False
        self._listen()
        self._process.stdout.close()
        return ended

    def _listen(self) -> None:
        if os.getpid() == self._owner and not self._process.stdout.closed:
            with contextlib.suppress(OSError):
                while part := self._process.stdout.read(65536):
                    self._heard += part

    def _send(self) -> None:
        try:
            while self._waiting and (sent := self._process.stdin.write(self._waiting)):
                del self._waiting[:sent]
        except OSError:
            self.lost = True

    def _end(self) -> None:
        for pid in (*_children(self._process.pid), self._process.pid):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


def _read(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # of Python itself, before the program began
        return None


def _children(pid: int) -> list[int]:
    """The processes that a process has started, where the system tells."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(status.parent.name))
    return found
