"""Settings that can be judged by themselves, before torch is loaded: one sentence for what is wrong, at once."""

import math
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import kinds, looking, values
from conf.errors import UserError, reason
from conf.names import CONF, nearest

NUMBERS = {
    "optimizer": ("lr", "reference_batch", "weight_decay", "layer_decay"),
    "schedule": ("warmup_epochs", "cooldown_epochs", "late_epochs", "warmup_lr", "min_lr"),
}


def check(cfg: DictConfig) -> None:
    """What is wrong with the values of a run or an evaluation, as far as no part of it has to be made for that.

    Raises:
        UserError: a value is missing, cannot be computed (`data.root` without images), or is not what it must be.
    """
    check_values(resolved(cfg))


def check_values(config: dict[str, Any]) -> None:
    """The same of a configuration that is resolved."""
    if "checkpoint" in config:  # a run
        check_settings(config)
    for group, names in NUMBERS.items():
        for name in names:
            if (value := (config.get(group) or {}).get(name)) is not None:
                values.number(group, name, value, fix=f"set {group}.{name}")
    _check_names(config.get("optimizer") or {})
    if "probe" in config:
        looking.check(config["probe"])
    if HydraConfig.initialized():
        kinds.check_added(config, HydraConfig.get().overrides.task)
    kinds.check_kinds(config)


def _check_names(optimizer: dict[str, Any]) -> None:
    """Settings of optimizers: what stands in no file of conf/optimizer must stand in the code of one.

    Raises:
        UserError: a word that no optimizer of timm or torch has.
    """
    listed = "\n".join(path.read_text() for path in (CONF / "optimizer").glob("*.yaml"))
    if not (added := [name for name in optimizer if not re.search(rf"^{name}:", listed, re.MULTILINE)]):
        return
    folders = [Path(place, "optim") for package in ("timm", "torch") for place in _places(package)]
    code = "\n".join(path.read_text(errors="ignore") for folder in folders for path in folder.glob("*.py"))
    for name in added if folders else ():
        if not re.search(rf"\b{name}\b", code):
            close = nearest(name, set(optimizer) - {name})
            raise UserError(
                f"optimizer: no optimizer of timm has the setting {name!r}{close}; leave optimizer.{name} out"
            )


def _places(package: str) -> list[str]:
    """Where it is installed, which needs no import of it."""
    found = find_spec(package)
    return list(found.submodule_search_locations or ()) if found else []


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain data, every interpolation replaced."""
    written = dict(_leaves(OmegaConf.to_container(cfg)))
    if missing := [key for key, value in written.items() if value == "???"]:
        wanted = " ".join(f"{key}=..." for key in missing)
        raise UserError(f"{', '.join(missing)}: no value; give one on the command line: {wanted}")
    for key, value in written.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}: must be a finite number or text, got {value}; write {key}=\\'{value}\\' for text")
    try:
        return OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        message = reason(error)
        raise UserError(message if message != str(error).splitlines()[0] else f"{key}: {message}") from error


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that holds a value, with the value as it is written."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        yield path, node
    else:
        for name, value in items:
            yield from _leaves(value, f"{path}.{name}" if path else str(name))


def check_settings(config: dict[str, Any]) -> None:
    """What no single part can judge, before anything is built."""
    seed, precision = config["seed"], str(config["trainer"]["precision"])
    if type(seed) is not int or not 0 <= seed < 2**32:
        what = "a whole number of at least 0" if type(seed) is not int or seed < 0 else "below 2**32"
        raise UserError(f"seed: must be {what}, got {seed!r}; set seed=0, for instance")
    if precision in ("16-true", "bf16-true", "64-true", "64", "transformer-engine", "transformer-engine-float16"):
        raise UserError(
            "trainer: weights are kept in 32 bits (half precision loses small updates and averages), "
            f"got precision={precision}; set trainer.precision=bf16-mixed, 16-mixed or 32-true"
        )
    check_trainer(config["trainer"])


def check_trainer(settings: dict[str, Any]) -> None:
    """Counts that Lightning would stumble over later."""
    for name, least in [("max_epochs", 0), ("accumulate_grad_batches", 1), ("check_val_every_n_epoch", 1)]:
        value = settings.get(name)
        if value is not None and (type(value) is not int or (value < least and (name, value) != ("max_epochs", -1))):
            raise UserError(
                f"trainer: {name} must be a whole number of at least {least}, got {value!r}; set trainer.{name}"
            )
    _check_processes(settings)


COMPRESSIONS = (None, "fp16", "bf16", "powersgd")


def _check_processes(settings: dict[str, Any]) -> None:
    """What several processes are told."""
    timeout, compression = settings.get("timeout", 600), settings.get("gradient_compression")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0:
        raise UserError(
            f"trainer: timeout must be a number of seconds above 0, got {timeout!r}; set trainer.timeout=600"
        )
    if compression not in COMPRESSIONS:
        known = ", ".join(map(str, COMPRESSIONS[1:]))
        raise UserError(
            f"trainer: gradient_compression must be one of {known} or null, got {compression!r}; "
            "set trainer.gradient_compression"
        )
    for name in ("sync_batchnorm", "static_graph"):
        if type(settings.get(name, False)) is not bool:
            raise UserError(f"trainer: {name} must be true or false, got {settings[name]!r}; set trainer.{name}")
    if settings.get("strategy") == "fsdp":
        _check_shares(settings)


def _check_shares(settings: dict[str, Any]) -> None:
    """What `fsdp` cannot do."""
    if settings.get("precision") == "16-mixed":
        raise UserError(
            "trainer: strategy=fsdp cannot scale the loss of 16-mixed, got precision=16-mixed; "
            "set trainer.precision=bf16-mixed or 32-true"
        )
    for name in ("gradient_compression", "static_graph"):
        if settings.get(name):
            raise UserError(f"trainer: {name} is of strategy=ddp, got {settings[name]!r} with fsdp; leave it out")
