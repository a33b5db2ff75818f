"""What Lightning is told about devices and processes: `trainer.strategy` and the keys of conf/trainer that are ours."""

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.strategies import Strategy

from models.engines.cluster import cluster
from models.engines.distributed import Distributed
from models.engines.sequence_parallel import SequenceParallel
from models.engines.sharded import FullySharded
from models.engines.sync_norm import SyncNorms

OURS = ("static_graph", "gradient_compression", "timeout")
TIMEOUT = 600  # seconds, where a configuration does not say it
UNUSED = {"ddp_find_unused_parameters_true": True, "ddp_find_unused_parameters_false": False}


def engine(trainer: DictConfig) -> tuple[dict[str, DictConfig], dict[str, Any]]:
    """The configuration of the trainer as Lightning knows it, and what else to give it.

    Args:
        trainer: `cfg.trainer` of a run or of an evaluation.

    Returns:
        `{"trainer": ...}` without the keys that are ours, and keywords of `Trainer` beside it.
    """
    settings = OmegaConf.to_container(trainer, resolve=True)
    chosen = strategy(settings)
    plugins = [*cluster(), *([SyncNorms()] if settings.get("sync_batchnorm") else [])]
    lightning = OmegaConf.create({key: value for key, value in settings.items() if key not in OURS})
    return {"trainer": lightning}, {"plugins": plugins, **({} if chosen is None else {"strategy": chosen})}


def strategy(settings: Mapping[str, Any]) -> Strategy | None:
    """Ours for `ddp`, `fsdp`, `sequence_parallel` and for `auto` on several devices; None where Lightning chooses."""
    word = settings.get("strategy", "auto")
    if word == "auto" and not several(settings):
        return None
    timeout = settings.get("timeout", TIMEOUT)
    if word in ("auto", "ddp", *UNUSED):
        unused = {"find_unused_parameters": UNUSED[word]} if word in UNUSED else {}
        static = {"static_graph": True} if settings.get("static_graph") else {}
        return Distributed(timeout, settings.get("gradient_compression"), **unused, **static)
    if word == "fsdp":
        return FullySharded(timeout)
    if word == "sequence_parallel":
        return SequenceParallel(timeout)
    return None


def several(settings: Mapping[str, Any]) -> bool:
    """Whether more than one device is asked for."""
    devices, nodes = settings.get("devices", "auto"), settings.get("num_nodes", 1)
    if isinstance(devices, list):
        count = len(devices)
    elif str(devices) in ("auto", "-1"):
        on_cpu = str(settings.get("accelerator")) == "cpu"
        count = 1 if on_cpu else torch.cuda.device_count()
    else:
        words = [word for word in str(devices).split(",") if word.strip()]  # "0,1": two of the GPUs, "0,": one
        count = int(devices) if str(devices).isdigit() else len(words)
    return count * nodes > 1
