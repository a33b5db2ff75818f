"""Weights & Biases: online, else offline, else not at all; it cannot stop a run."""

import hashlib
import netrc
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from conf.names import short
from models.loggers.messenger import Messenger
from models.side_outputs import attempt

WANDB_URL = "https://api.wandb.ai"
PROGRAM = Path(__file__).with_name("wandb_process.py")
SETTINGS = {
    **{"init_timeout": 15, "finish_timeout": 10, "finish_timeout_raises": True},  # seconds
    **{"silent": True, "console": "off"},
}
END, STOP, UPLOAD = 12.0, 5.0, 300.0  # seconds that the end of a run waits: one that stops; one that uploads its best
REACHED_WITHIN = 3.0  # seconds
EARLY = 10_000  # rows that are kept until the W&B run has begun
# seconds that the end of a run waits for the beginning of its W&B run: offline, which asks nobody; online; of a stop
START_OFFLINE, START_ONLINE, START_STOPPED = 60.0, 3.0, 1.0


class SafeWandb(Logger):
    """The W&B run of a run, in a process of its own: nothing that W&B does is waited for, but at the end for a while.

    Its failures are said once; metrics.csv has everything.

    Args:
        run_dir: the folder of the run.
        given: what the process starts with, see `models.loggers.wandb_process`.
        checkpoint: what becomes an artifact at the end.
    """

    def __init__(self, run_dir: Path, given: Mapping[str, Any], checkpoint: Path | None = None) -> None:
        super().__init__()
        self.run_dir, self.given, self.checkpoint = run_dir, given, checkpoint
        self.broken, self.mode = False, ""
        self._stopped = self._finished = self._closed = False
        self._until = 0.0  # until when the end waits
        self._messenger: Messenger | None = None
        self._told: list[tuple[str, Any]] = []  # until the W&B run has begun

    @property
    def name(self) -> str:
        return self.given["init"]["project"]

    @property
    def version(self) -> str:
        return self.given["ids"][self.given["modes"][0]]

    def start(self) -> None:
        """Starts the process; called when the run begins, so that one that is refused leaves nothing."""
        if attempt("logger: the process of Weights & Biases", self._start):
            told, self._told = self._told, []
            for order, content in told:
                self._tell(order, content)

    def _start(self) -> None:
        self._messenger = Messenger(PROGRAM)
        self._messenger.tell(self.given)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is shown from the start."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._tell("log", dict(metrics) | ({} if step is None else {"trainer/global_step": step}))

    def log_image(self, name: str, path: Path) -> None:
        """Shows a picture file."""
        self._tell("image", {"name": name, "path": str(path.absolute())})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Lightning says how the run ended; one that was stopped is in a hurry, and the W&B run ends from here on."""
        if status == "success" or self._stopped:
            return
        self._stopped, self._until = True, time.monotonic() + STOP  # curves are drawn meanwhile
        self._tell("finish", 1)
        if self._messenger is not None:
            self._begin_at_last()

    def close(self) -> None:
        """Ends the W&B run, and what has not ended after a while; says how to send what was not sent."""
        if self._messenger is None or self._closed:
            return
        self._closed = True
        seconds = STOP
        if not self._stopped:
            self._begin_at_last()
            seconds = END
            if self.checkpoint is not None and self.checkpoint.exists():
                self._tell("artifact", str(self.checkpoint.resolve()))
                seconds = UPLOAD
            self._tell("finish", 0)
            self._until = time.monotonic() + seconds
        ended = self._messenger.close(max(self._until - time.monotonic(), 0.1))
        if not ((self._hear() or self._finished) and ended):
            self._fail("its process ended" if ended else f"it has not ended within {seconds:.0f} s")
        if self.broken and list(self.run_dir.glob("wandb/run-*")):
            print(f"logger: what was not sent lies in the folder; upload with: {self._sync('run-*')}", flush=True)

    def _begin_at_last(self) -> None:
        """Of a run that ends before its W&B run has begun: offline, where a server has not answered so far."""
        if not self._begun() and not self.broken and self.given["modes"][0] == "online":
            self._go_offline()

    def _begun(self) -> bool:
        """Whether the W&B run has begun, of a run that may be over within seconds; waits a little for it."""
        seconds = START_OFFLINE if self.given["modes"] == ["offline"] else START_ONLINE
        end = time.monotonic() + (START_STOPPED if self._stopped else seconds)
        while not (self.mode or self.broken) and time.monotonic() < end:
            self._finished = self._hear() or self._finished
            time.sleep(0.05)
        return bool(self.mode)

    def _go_offline(self) -> None:
        """Begins anew where no server is asked, with everything that was told so far."""
        self._messenger.close(0)
        self._fail("the server does not answer")
        self.given, self.broken = {**self.given, "modes": ["offline"]}, False
        self.start()
        self.say_offline()

    def _tell(self, order: str, content: Any) -> None:
        if not self.mode and len(self._told) < EARLY:
            self._told.append((order, content))
        if self._messenger is None:
            return
        self._messenger.tell((order, content))
        self._finished = self._hear() or self._finished

    def _hear(self) -> bool:
        """Says what the process says; whether it has finished."""
        events = self._messenger.heard()
        for event in events:
            if event["event"] == "failed":
                self._fail(event["reason"])
            elif event["event"] == "started":
                self.broken, asked, self.mode = False, self.given["modes"][0], event["mode"]
                self._told.clear()
                if self.mode == "offline" != asked:
                    self.say_offline()
        if self._messenger.lost:
            self._fail("it does not answer")
        return any(event["event"] == "finished" for event in events)

    def _fail(self, why: str) -> None:
        if not self.broken:
            self.broken = True
            print(f"logger: Weights & Biases failed ({why}); the run goes on, metrics.csv has everything", flush=True)

    def say_offline(self) -> None:
        """Says that nothing is sent now, and how it is sent later."""
        print(f"logger: Weights & Biases is offline; upload with: {self._sync('offline-run-*')}")

    def _sync(self, runs: str) -> str:
        return f"wandb sync {short(self.run_dir)}/wandb/{runs}"


def log_picture(loggers: Iterable[Logger], name: str, path: Path) -> None:
    """Shows a picture file to the loggers that take pictures."""
    for logger in loggers:
        if isinstance(logger, SafeWandb):
            logger.log_image(name, path)


def open_wandb(
    settings: Mapping[str, Any],
    run_dir: Path,
    config: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    figures: Iterable[str] = (),
) -> list[Logger]:
    """Online, or else offline, or else nothing."""
    mode = os.environ.get("WANDB_MODE") or settings["mode"]
    if mode == "auto":
        mode = "online" if _has_key() and _reachable() else "offline"
    if mode == "disabled":
        return []
    if not _installed():
        print("logger: Weights & Biases is not installed; the run goes on, metrics.csv has everything")
        return []
    given = start_with(settings, run_dir, mode, {**config, **(facts or {})}, figures)
    best = run_dir.absolute() / "checkpoints" / "best" if settings.get("artifacts") else None
    logger = SafeWandb(run_dir, given, best)
    if given["modes"] == ["offline"]:
        logger.say_offline()
    return [logger]


def start_with(
    settings: Mapping[str, Any], run_dir: Path, mode: str, config: Mapping[str, Any], figures: Iterable[str] = ()
) -> dict[str, Any]:
    """What the process of W&B is told first."""
    run = config.get("run", {})
    sweep, name = place(run_dir, str(run.get("name")))
    modes = {"online": ["online", "offline"]}.get(mode, [mode])
    init = {
        "project": settings["project"],
        "name": name,
        "group": settings.get("group") or sweep or run.get("recipe"),
        "job_type": settings.get("job_type"),
        "dir": str(run_dir.absolute()),
        "resume": "allow",
        "entity": settings["entity"],
        "tags": tags_of(settings["tags"], run),
    }
    # the same folder is the same run: a continued run goes on in the same W&B run
    ids = {m: hashlib.sha256(f"{run_dir.resolve()} {m}".encode()).hexdigest()[:12] for m in modes}
    best = {figure: "min" if "loss" in figure else "max" for figure in figures}
    shown = {"config": plain(config), "best": best, "argv": sys.argv}
    watched = {"x_stats_pid": os.getpid()}  # whose memory and load it shows
    return {"modes": modes, "init": init, "ids": ids, "settings": SETTINGS | watched, **shown}


def plain(value: Any) -> Any:
    """What JSON has a word for; anything else as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def place(run_dir: Path, name: str) -> tuple[str | None, str]:
    """The sweep that a run belongs to and its name in it, `agent/seed-0`; None and its own name without a sweep."""
    for parent in run_dir.parents if run_dir.name != name else ():
        if parent.name == name:
            return name, run_dir.relative_to(parent).as_posix()
    return None, run_dir.name


def tags_of(given: Iterable[Any], run: Mapping[str, Any]) -> list[str]:
    """What was chosen, to filter by, and the user's own; W&B takes at most 64 letters each."""
    chosen = [run.get(key) for key in ("model", "attention", "data", "recipe")]
    return list(dict.fromkeys(str(tag)[:64] for tag in [*chosen, *given] if tag))


def _installed() -> bool:
    try:
        return find_spec("wandb") is not None
    except ValueError:  # somebody has put something in its place
        return True


def _reachable() -> bool:
    """Whether the server answers within three seconds, its name included; believed without a test behind a proxy."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    url = urlsplit(os.environ.get("WANDB_BASE_URL", WANDB_URL))
    found: list[bool] = []
    # in a thread that is left: a server of names may let us wait for minutes
    looking = Thread(target=lambda: found.append(_answers(url.hostname, url.port, url.scheme)), daemon=True)
    looking.start()
    looking.join(REACHED_WITHIN)
    if found != [True]:
        print(f"logger: {url.hostname} cannot be reached")
    return found == [True]


def _answers(host: str | None, port: int | None, scheme: str) -> bool:
    try:
        socket.create_connection((host, port or (80 if scheme == "http" else 443)), timeout=REACHED_WITHIN).close()
    except OSError:
        return False
    return True


def _has_key() -> bool:
    """Whether W&B would find a key without asking: in the environment, or in netrc, where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", WANDB_URL)).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
