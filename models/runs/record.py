"""The record of a run: train.log with every printed line and its time, env.json, config.yaml, split.csv, .hydra.

Nothing is written before training starts, so that a command that is refused leaves a folder as it was.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import sys
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback

from conf.errors import UserError
from conf.output import Kept
from conf.revision import revision
from data.changes import NAME, keep_names
from data.sources.split_file import leave_split
from models.callbacks.loops import call_last
from models.loggers.weights_and_biases import SafeWandb
from models.runs.environment import environment
from models.side_outputs import append, attempt, begin, put

_CONTROL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|.)")  # colours, cursor movements, titles
PATIENCE = 10.0  # seconds that training waits for whoever reads what it prints; train.log has everything
MAX_PATCH = 2**20  # bytes of uncommitted changes that are kept; of more only the hash


class RunLog:
    """Lines with the time at which they were printed, in memory until the file of the run is known and has room."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._lines: deque[str] = deque(maxlen=1000)  # other processes than the first never begin
        self._process = os.getpid()

    def add(self, line: str) -> None:
        if self._process != os.getpid():  # a loader process, which writes into the same file: not what waits here
            self._lines.clear()
            self._process = os.getpid()
        self._lines.append(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line.rstrip()}\n")
        self._write()

    def begin(self, path: Path) -> None:
        """Writes what was kept behind what the file holds already, and from now on every line as it comes."""
        if self._path is None:
            self._path = path
            self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        with contextlib.suppress(OSError):  # said where the next file fails; the lines wait
            append(self._path, "".join(self._lines))
            self._lines.clear()


class Tee:
    """A stream that also gives its whole lines to a log, as a reader sees them: without colours and progress bars."""

    def __init__(self, stream: TextIO, log: RunLog) -> None:
        self._stream, self._log, self._line = stream, log, ""
        self._lost = False

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            # a carriage return begins the line anew: what stood there was a progress bar
            shown = _CONTROL.sub("", line).rstrip("\r").rpartition("\r")[2]
            if shown.strip() or not line.strip():
                self._log.add(shown)
        self._line = self._line[self._line.rfind("\r") + 1 :]
        self._stream.write(text)
        if not self._lost and getattr(self._stream, "lost", False):
            self._lost = True
            self._log.add("what is printed is not read, or there is no room for it: from here on it stands here only")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def recorded() -> Iterator[RunLog]:
    """Everything printed and logged inside goes to the terminal as ever and into the log; so does what ends it."""
    begin()
    log, streams = RunLog(), (sys.stdout, sys.stderr)
    out, err = (Tee(stream, log) for stream in streams)
    handlers = [handler for handler in logging.root.handlers if isinstance(handler, logging.StreamHandler)]
    moved = {handler: out if handler.stream is streams[0] else err for handler in handlers if handler.stream in streams}
    before = {handler: handler.setStream(tee) for handler, tee in moved.items()}
    sys.stdout, sys.stderr = out, err
    _wait_for_readers(streams, PATIENCE)
    try:
        yield log
    except UserError as error:  # printed by the command line, when the streams are the terminal's again
        log.add(f"{Path(sys.argv[0]).name}: {error}")
        raise
    except Exception:
        for line in traceback.format_exc().splitlines():
            log.add(line)
        raise
    finally:
        sys.stdout, sys.stderr = streams
        _wait_for_readers(streams, None)
        for handler, stream in before.items():
            handler.setStream(stream)


def _wait_for_readers(streams: tuple[TextIO, TextIO], seconds: float | None) -> None:
    for stream in streams:
        if isinstance(stream, Kept):
            stream.patience = seconds


class Record(Callback):
    """Begins the record of a run in its folder, on the first process, when training starts.

    Args:
        run_dir: the folder of the run.
        log: what was printed so far, and will be.
        cfg: the composed configuration.
        config: the same, resolved.
    """

    def __init__(self, run_dir: Path, log: RunLog, cfg: DictConfig, config: dict[str, Any]) -> None:
        self.run_dir, self.printed, self.cfg, self.config = run_dir, log, cfg, config
        self.begun = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        call_last(trainer, self)  # Checkpoints may still refuse to begin

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.begin(trainer.global_step, trainer.datamodule)
            for logger in trainer.loggers:
                if isinstance(logger, SafeWandb):
                    logger.start()

    def begin(self, step: int, data: pl.LightningDataModule) -> None:
        """Writes the files; a second call does nothing."""
        if self.begun:
            return
        self.begun = True
        self.printed.begin(self.run_dir / "train.log")
        text = OmegaConf.to_yaml(OmegaConf.create(self.config))
        attempt("config.yaml", put, self.run_dir / "config.yaml", text)
        attempt("split.csv", leave_split, data.source, self.run_dir)
        attempt(NAME, lambda: keep_names(self.run_dir / NAME, train=data.source.train, val=data.source.val))
        attempt(".hydra", _write_hydra, self.run_dir / ".hydra", self.cfg)
        facts = {"step": step, "threads": self.config.get("threads")}
        attempt("env.json", write_environment, self.run_dir, facts)


def write_environment(run_dir: Path, facts: dict[str, Any]) -> None:
    """Writes env.json and, where the code was changed since its commit, changes.patch.

    A continued run keeps what it was started with before under `earlier`, without the packages.
    """
    path = run_dir / "env.json"
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        before = {}
    earlier = before.pop("earlier", []) + ([before] if before else [])
    content = environment() | facts | {"patch": _keep_patch(run_dir)}
    if earlier:
        content["earlier"] = [{key: value for key, value in start.items() if key != "packages"} for start in earlier]
    put(path, json.dumps(content, indent=2) + "\n")


def _keep_patch(run_dir: Path) -> dict[str, Any] | None:
    """Where the uncommitted changes are kept, and their hash; None where there are none."""
    patch = revision().patch.encode(errors="replace")
    if not patch:
        return None
    digest = hashlib.sha256(patch).hexdigest()
    if len(patch) > MAX_PATCH:
        return {"file": None, "bytes": len(patch), "sha256": digest}
    name = f"changes-{digest[:8]}.patch"
    put(run_dir / name, patch)
    return {"file": name, "bytes": len(patch), "sha256": digest}


def _write_hydra(folder: Path, cfg: DictConfig) -> None:
    """The files by which Hydra would say what was asked for; it writes them before it is known whether a run begins."""
    folder.mkdir(exist_ok=True)
    hydra = HydraConfig.get()
    for name, content in (("config", cfg), ("hydra", {"hydra": hydra}), ("overrides", hydra.overrides.task)):
        put(folder / f"{name}.yaml", OmegaConf.to_yaml(OmegaConf.create(content) if name == "hydra" else content))
