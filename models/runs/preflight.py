"""Before a run: every setting looked at, so that what is wrong is one clear error and nothing has been started."""

import contextlib
import fcntl
import logging
import os
import platform
import warnings
import weakref
from pathlib import Path
from typing import IO, Any

import pytorch_lightning as pl
from hydra.errors import InstantiationException
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only

from conf.errors import UserError
from conf.names import short
from models.factory import cause_of, instantiate
from models.runs.memory import shortage


def quiet() -> None:
    """Hide notes of libraries that no user can act on."""
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*number of training batches.*",
        ".*lr_scheduler.step.*",
        ".*dataloader is not resumable.*",
        ".*sync_dist=True.*",  # torchmetrics reduces over processes itself
        ".*Grad strides do not match bucket view strides.*",
    ):
        warnings.filterwarnings("ignore", message=text)


def check_monitor(config: dict[str, Any], task: pl.LightningModule) -> None:
    monitor = config["checkpoint"]["monitor"]
    averaged = (config["callbacks"] or {}).get("ema") is not None
    names = [name for name in task.figures if averaged or not name.endswith("_ema")]
    mode = "min" if "loss" in str(monitor) else "max"
    if monitor in names and config["checkpoint"]["mode"] != mode:
        given = config["checkpoint"]["mode"]
        raise UserError(
            f"checkpoint: the best {monitor} is its {mode}imum, got mode={given}; set checkpoint.mode={mode}"
        )
    if monitor is not None and monitor not in names:
        raise UserError(
            f"checkpoint: monitor must be one of {', '.join(names)}, got {monitor!r}; set checkpoint.monitor"
        )


def check_data(data: pl.LightningDataModule, training: bool = True) -> None:
    """Looks at the data before anything is started; without `training` only at what is evaluated.

    Raises:
        UserError: all that is wrong with it.
    """
    try:
        data.check(training)
    except (ValueError, OSError) as error:  # of ours, or of a library that reads the data
        raise UserError(str(error)) from error


def part_of(cfg: DictConfig, key: str, **extra: Any) -> Any:
    """Instantiates one part of the configuration; what a user got wrong in it becomes a `UserError`."""
    try:
        return instantiate(cfg[key], **extra)
    except (InstantiationException, ValueError, TypeError) as error:
        cause = cause_of(error)
        if shortage(cause) is not None:
            raise cause from error
        raise UserError(_say(key, cause)) from error


_SAID = ValueError | TypeError | FileNotFoundError | pl.utilities.exceptions.MisconfigurationException


def _say(key: str, cause: BaseException) -> str:
    if not isinstance(cause, _SAID):  # a setting that nobody thought of
        reason = " ".join(str(cause).split())[:300]
        return f"{key}: cannot be built with these settings, got {type(cause).__name__}: {reason}; change them"
    if isinstance(cause, TypeError) and "unexpected keyword argument" in str(cause):
        return f"{key}: {str(cause).removeprefix('__init__() ')}; remove that key"
    return str(cause)


_LOCKS: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def _let_go() -> None:
    for file in list(_LOCKS):
        file.close()


os.register_at_fork(after_in_child=_let_go)  # a process that outlives this one must not go on to hold its folder


def lock_folder(run_dir: Path) -> IO[str]:
    """Holds the run folder until it is closed or the process ends, so that no second run writes into it.

    Raises:
        UserError: another process holds it, or nothing can be written into it.
    """
    try:
        file = (run_dir / ".lock").open("a+")
    except OSError as error:
        raise UserError(
            f"run: {short(run_dir)} cannot be written: {error.strerror or error}; give another run.name, or "
            "hydra.run.dir=<folder>"
        ) from error
    _LOCKS.add(file)
    if rank_zero_only.rank != 0:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"run: {short(run_dir)} is in use by {file.read().strip() or 'another process'}; give another run.name"
        ) from None
    except OSError:  # a file system without locks
        return file
    with contextlib.suppress(OSError):  # no room for the text: the lock holds without it
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
    return file
