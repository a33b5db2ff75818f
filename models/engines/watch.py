"""Watches the processes of a run for each other, so that one that has died or hangs ends the job and is named.

Every process has a thread that leaves a sign in the store of the process group and looks for what others left there.
Process 0 looks at the signs of all. Who finds that a process has failed says so in the store; then every process has
`GRACE` seconds to end by itself, with an error of its own that the operation which it waited in raises, and is ended
after that: a collective of NCCL may wait for ever.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import Store

from conf.stops import leave

TICK = 1.0  # seconds between looks
SIGNS = 5  # looks between signs
SILENT = 40.0  # seconds without a sign after which a process of another machine has died
GRACE = 5.0  # seconds
_UNKNOWN = ("an unknown host", -1)
_FAILED, _SIGN, _WAITED = "failed", "sign", "waited"


class Failure(NamedTuple):
    """Which process has failed, and how; `status` is that of the job."""

    rank: int
    host: str
    reason: str
    step: int
    status: int = 1

    def told(self, world: int) -> str:
        """In one sentence."""
        at = f" at step {self.step}" if self.step >= 0 else ""
        return f"process {self.rank} of {world} on {self.host} {self.reason}{at}"


class Watch(threading.Thread):
    """The thread of one process.

    Args:
        store: of the process group, a connection of its own.
        rank, world: of this process, and how many there are.
        step: the optimizer step that it is at.
        folder: of the run, for files of errors; None for none.
    """

    def __init__(self, store: Store, rank: int, world: int, step: Callable[[], int], folder: Path | None) -> None:
        super().__init__(daemon=True, name="watch")
        self._store, self.rank, self.world, self.step = store, rank, world, step
        self.failure: Failure | None = None
        self.folder = folder
        self._places: dict[int, tuple[str, int]] = {}  # by rank: host and step, as it said last
        self._ended = threading.Event()
        self._signs: dict[int, tuple[dict[str, Any], float]] = {}  # by rank: the last, and when it was new
        self._gone: set[int] = set()
        self._main = threading.main_thread().ident

    def leave(self) -> None:
        """This process ends by itself."""
        self._ended.set()

    def stop(self) -> None:
        """This process has done its part."""
        self.leave()
        self._try(lambda: self._store.set(f"{_SIGN}{self.rank}", json.dumps({"done": True})))

    def run(self) -> None:
        number = 0
        while not self._ended.wait(TICK):
            number += 1
            if number % SIGNS == 0:
                self._try(lambda number=number: self._say(number))
                self.place(0)
            self.failure = self.failure or self._asked(look=self.rank == 0)
            if self.failure is not None:
                return self._end()

    def start(self) -> None:
        """All processes have met: each says where it is, and knows where process 0 is before anything can happen."""
        self._try(lambda: self._say(0))
        self._try(lambda: self._store.get(f"{_SIGN}0"))  # which waits for it
        self.place(0)
        super().start()

    def found(self, seconds: float) -> Failure | None:
        """What is known of a failure, after so many seconds at most."""
        end = time.monotonic() + seconds
        while self.failure is None:
            self.failure = self._asked()
            if self.failure is None and time.monotonic() > end:
                break
            time.sleep(0.1)
        return self.failure

    def fail(self, failure: Failure) -> None:
        """Tells the others; the first one who does is right."""
        self.failure = self.failure or failure
        self._try(lambda: self._store.compare_set(_FAILED, "", json.dumps(failure)))

    def waited(self) -> list[int]:
        """Says that this process has waited in vain; who else has not said so within seconds."""
        self._try(lambda: self._store.set(f"{_WAITED}{self.rank}", "1"))
        time.sleep(3 * TICK)
        others = [rank for rank in range(self.world) if rank != self.rank]
        try:
            return [rank for rank in others if not self._store.check([f"{_WAITED}{rank}"])]
        except RuntimeError:
            return [0]

    def place(self, rank: int) -> tuple[str, int]:
        """Host and step of a process, as it said last, also once the store is gone."""
        try:
            sign = json.loads(self._store.get(f"{_SIGN}{rank}")) if self._store.check([f"{_SIGN}{rank}"]) else {}
        except RuntimeError:
            sign = {}
        if "host" in sign:
            self._places[rank] = sign["host"], sign["step"]
        return self._places.get(rank, _UNKNOWN)

    def _say(self, number: int) -> None:
        self._store.set(f"{_SIGN}{self.rank}", json.dumps(self._sign(number)))

    def _asked(self, look: bool = False) -> Failure | None:
        """What the store says of a failure; where it does not answer, the process that keeps it has failed."""
        try:
            return self._failed() or (self._look() if look else None)
        except RuntimeError:
            host, step = self._places.get(0, _UNKNOWN)
            return Failure(0, host, "does not answer any more", step)

    def _sign(self, number: int) -> dict[str, Any]:
        return {"number": number, "host": socket.gethostname(), "pid": os.getpid(), "in": _space(), "step": self.step()}

    def _failed(self) -> Failure | None:
        return Failure(*json.loads(self._store.get(_FAILED))) if self._store.check([_FAILED]) else None

    def _look(self) -> Failure | None:
        """Process 0: whose process is gone, or has given no sign for long."""
        now = time.monotonic()
        for rank in range(1, self.world):
            if not self._store.check([f"{_SIGN}{rank}"]):
                continue
            sign = json.loads(self._store.get(f"{_SIGN}{rank}"))
            if sign.get("done"):
                continue
            last, since = self._signs.get(rank, (None, now))
            self._signs[rank] = (sign, since if sign == last else now)
            here = sign["in"] == _space()
            gone = here and not _lives(sign["pid"])
            if gone and rank not in self._gone:  # a launcher that knows how it ended says so first
                self._gone.add(rank)
            elif gone or now - self._signs[rank][1] > SILENT:
                reason = "has died" if gone else f"has given no sign for {SILENT:.0f} s"
                failure = Failure(rank, sign["host"], reason, sign["step"])
                self.fail(failure)
                return failure
        return None

    def _end(self) -> None:
        """Gives the process time to end by itself, then ends it."""
        if self._ended.wait(GRACE):
            return
        frame = sys._current_frames().get(self._main)
        stood = "".join(traceback.format_stack(frame)) if frame is not None else ""
        write_error(self.folder, self, self.failure.told(self.world), stood)
        if not self.speaks:
            os._exit(self.failure.status)
        leave(self.failure.told(self.world), self.failure.status, sys.__stderr__)

    @property
    def speaks(self) -> bool:
        """Whether this is the one that says what has happened: process 0, or 1 where it is 0 that has failed."""
        return self.rank == (0 if self.failure is None or self.failure.rank != 0 else 1)

    @staticmethod
    def _try(call: Callable[[], Any]) -> None:
        """What a store that is gone cannot do any more is left."""
        try:
            call()
        except RuntimeError:
            return


def write_error(folder: Path | None, watch: Watch, message: str, trace: str) -> Path | None:
    """`errors/rank<r>.json` in the folder of the run; None where it cannot be written."""
    if folder is None:
        return None
    path = folder / "errors" / f"rank{watch.rank}.json"
    about = {"rank": watch.rank, "processes": watch.world, "host": socket.gethostname(), "pid": os.getpid()}
    about |= {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "step": watch.step(), "error": message, "traceback": trace}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about, indent=1) + "\n")
    except OSError:
        return None
    return path


def _lives(pid: int) -> bool:
    """Whether there is such a process; one that has ended and is waited for by nobody is none."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return False
    except OSError:
        return True
    else:
        return state != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _space() -> str:
    """Names the machine and the space of numbers of processes in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
