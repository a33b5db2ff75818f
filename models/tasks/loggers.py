"""Loggers of a run: metrics.csv always; Weights & Biases or TensorBoard when chosen. None of them can stop a run."""

import csv
import hashlib
import netrc
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from models.tasks.preflight import short

WANDB_URL = "https://api.wandb.ai"
SETTINGS = {"init_timeout": 30, "finish_timeout": 60, "silent": True, "console": "off"}  # seconds
NAMES = ("wandb", "csv", "tensorboard", "none")


def build_loggers(settings: Mapping[str, Any], run_dir: Path, config: dict[str, Any], resume_step: int) -> list[Logger]:
    """The loggers of one run; metrics.csv first.

    Args:
        settings: the group `logger`: `name`, and the keywords of that logger.
        run_dir: where everything is written.
        config: the resolved configuration, shown by W&B.
        resume_step: the optimizer step that the run continues from; later rows of an existing metrics.csv are dropped.
    """
    name = settings["name"]
    if name not in NAMES:
        raise ValueError(f"logger: name must be one of {', '.join(NAMES)}, got {name!r}; set logger=csv, for instance")
    loggers: list[Logger] = [MetricsCSV(run_dir / "metrics.csv", resume_step)]
    if name == "wandb" and rank_zero_only.rank == 0:
        loggers += _wandb(settings, run_dir, config)
    if name == "tensorboard":
        loggers.append(TensorBoardLogger(run_dir, name="", version="tensorboard"))
    return loggers


class MetricsCSV(Logger):
    """One row per logged step, a column per metric; columns that appear later are added to the file."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        super().__init__()
        self.path, self.columns = path, ["step", "epoch"]
        self.rows = [row for row in read_metrics(path) if float(row["step"]) < resume_step]
        for row in self.rows:
            self._add_columns(row)
        self._pending = len(self.rows) > 0 or path.exists()

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step or 0, "epoch": int(metrics.get("epoch", 0))} | {
            k: v for k, v in metrics.items() if k != "epoch"
        }
        self._pending = self._add_columns(row) or self._pending
        self.rows.append(row)
        if not self._pending and self.path.exists():
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    @rank_zero_only
    def save(self) -> None:
        """Rewrites the file when its header is out of date."""
        if not self._pending or not self.rows:
            return
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        self._pending = False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _add_columns(self, row: Mapping[str, Any]) -> bool:
        new = [key for key in row if key not in self.columns]
        self.columns += new
        return bool(new)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv without their empty cells; [] when there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


class SafeWandb(WandbLogger):
    """A WandbLogger whose failures are reported once and then ignored."""

    broken = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._try(super().log_metrics, metrics, step)

    def log_hyperparams(self, params: Any) -> None:
        self._try(super().log_hyperparams, params)

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self._try(super().log_image, key, images, step, **kwargs)

    def finalize(self, status: str) -> None:
        self._try(super().finalize, status)

    def start(self, config: dict[str, Any]) -> bool:
        """Opens the W&B run and shows it the configuration; False when that fails."""
        self._try(lambda: self.experiment.config.update(config, allow_val_change=True))
        return not self.broken

    def close(self) -> None:
        """Ends the W&B run; without this the next run of a sweep would write into it."""
        import wandb

        self._try(wandb.finish)

    def _try(self, call: Any, *args: Any, **kwargs: Any) -> None:
        if self.broken:
            return
        try:
            call(*args, **kwargs)
        except Exception as error:  # whatever a remote service does, training goes on
            self.broken = True
            print(f"logger: Weights & Biases failed ({error}); the run goes on, metrics.csv has everything")


def _wandb(settings: Mapping[str, Any], run_dir: Path, config: dict[str, Any]) -> list[Logger]:
    """Online, or else offline, or else nothing."""
    os.environ.setdefault("WANDB_SILENT", "true")  # its greetings; failures are reported here
    mode = os.environ.get("WANDB_MODE") or settings["mode"]
    if mode == "auto":
        mode = "online" if _has_key() and _reachable() else "offline"
    modes = {"online": ["online", "offline"]}.get(mode, [mode])
    for attempt in modes:
        logger = _wandb_logger(settings, run_dir, attempt)
        if logger.start(config):
            if attempt == "offline":
                print(
                    f"logger: Weights & Biases is offline; upload with: wandb sync {short(run_dir)}/wandb/offline-run-*"
                )
            return [logger]
    return []


def _wandb_logger(settings: Mapping[str, Any], run_dir: Path, mode: str) -> SafeWandb:
    import wandb

    known = wandb.Settings.model_fields  # older releases have no finish_timeout
    # the same folder is the same run: a continued run goes on in the same W&B run
    identity = hashlib.sha256(f"{run_dir.resolve()} {mode}".encode()).hexdigest()[:12]
    logger = SafeWandb(
        project=settings["project"],
        name=run_dir.name,
        save_dir=str(run_dir),
        id=identity,
        mode=mode,
        resume="allow",
        entity=settings["entity"],
        tags=list(settings["tags"]),
        settings=wandb.Settings(**{key: value for key, value in SETTINGS.items() if key in known}),
    )
    logger._wandb_init.pop("anonymous", None)  # Lightning passes it always; W&B warns of it
    return logger


def _reachable() -> bool:
    """Whether the server answers within three seconds; believed without a test behind a proxy."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    url = urlsplit(os.environ.get("WANDB_BASE_URL", WANDB_URL))
    try:
        socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), timeout=3).close()
    except OSError:
        print(f"logger: {url.hostname} cannot be reached")
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
