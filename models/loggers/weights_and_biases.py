"""Weights & Biases: online, else offline, else not at all; it cannot stop a run."""

import hashlib
import netrc
import os
import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.loggers import Logger, WandbLogger

from conf.names import short

WANDB_URL = "https://api.wandb.ai"
SETTINGS = {"init_timeout": 30, "finish_timeout": 60, "silent": True, "console": "off"}  # seconds


class SafeWandb(WandbLogger):
    """A WandbLogger whose failures are reported once and then ignored."""

    broken = False
    checkpoint: Path | None = None  # what becomes an artifact at the end

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._try(super().log_metrics, metrics, step)

    def log_hyperparams(self, params: Any) -> None:
        self._try(super().log_hyperparams, params)

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self._try(super().log_image, key, images, step, **kwargs)

    def finalize(self, status: str) -> None:
        self._try(super().finalize, status)

    def start(self, config: dict[str, Any], figures: Iterable[str] = ()) -> bool:
        """Opens the W&B run, shows it the configuration and names the figures of which the best value counts.

        False when that fails.
        """
        self._try(lambda: self.experiment.config.update(config, allow_val_change=True))
        for name in figures:
            best = "min" if "loss" in name else "max"
            self._try(lambda name=name, best=best: self.experiment.define_metric(name, summary=f"{best},last"))
        return not self.broken

    def close(self) -> None:
        """Ends the W&B run; without this the next run of a sweep would write into it."""
        import wandb

        if self.checkpoint is not None and self.checkpoint.exists():
            self._try(self._upload, self.checkpoint.resolve())
        self._try(wandb.finish)

    def _upload(self, folder: Path) -> None:
        """Makes the checkpoint an artifact of the run, called as the run."""
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^\w.-]+", "-", self.experiment.name), type="model")
        artifact.add_dir(str(folder))
        self.experiment.log_artifact(artifact, aliases=["best"])

    def _try(self, call: Any, *args: Any, **kwargs: Any) -> None:
        if self.broken:
            return
        try:
            call(*args, **kwargs)
        except Exception as error:  # whatever a remote service does, training goes on
            self.broken = True
            print(f"logger: Weights & Biases failed ({error}); the run goes on, metrics.csv has everything")


def log_picture(loggers: Iterable[Logger], name: str, path: Path) -> None:
    """Shows a picture file to the loggers that take pictures."""
    for logger in loggers:
        if isinstance(logger, SafeWandb):
            logger.log_image(name, [str(path)])


def open_wandb(
    settings: Mapping[str, Any],
    run_dir: Path,
    config: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    figures: Iterable[str] = (),
) -> list[Logger]:
    """Online, or else offline, or else nothing."""
    os.environ.setdefault("WANDB_SILENT", "true")  # its greetings; failures are reported here
    mode = os.environ.get("WANDB_MODE") or settings["mode"]
    if mode == "auto":
        mode = "online" if _has_key() and _reachable() else "offline"
    modes = {"online": ["online", "offline"]}.get(mode, [mode])
    for attempt in modes:
        logger = _wandb_logger(settings, run_dir, attempt, config.get("run", {}))
        if logger.start({**config, **(facts or {})}, figures):
            if attempt == "offline":
                print(
                    f"logger: Weights & Biases is offline; upload with: wandb sync {short(run_dir)}/wandb/offline-run-*"
                )
            return [logger]
    return []


def _wandb_logger(settings: Mapping[str, Any], run_dir: Path, mode: str, run: Mapping[str, Any]) -> SafeWandb:
    import wandb

    known = wandb.Settings.model_fields  # older releases have no finish_timeout
    # the same folder is the same run: a continued run goes on in the same W&B run
    identity = hashlib.sha256(f"{run_dir.resolve()} {mode}".encode()).hexdigest()[:12]
    sweep, name = place(run_dir, str(run.get("name")))
    logger = SafeWandb(
        project=settings["project"],
        name=name,
        group=settings.get("group") or sweep or run.get("recipe"),
        job_type=settings.get("job_type"),
        save_dir=str(run_dir),
        id=identity,
        mode=mode,
        resume="allow",
        entity=settings["entity"],
        tags=tags_of(settings["tags"], run),
        settings=wandb.Settings(**{key: value for key, value in SETTINGS.items() if key in known}),
    )
    logger._wandb_init.pop("anonymous", None)  # Lightning passes it always; W&B warns of it
    logger.checkpoint = run_dir / "checkpoints" / "best" if settings.get("artifacts") else None
    return logger


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
