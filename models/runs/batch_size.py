"""`data.batch_size=auto`: as many images at once as the memory of a GPU holds, found by real steps before the first."""

import gc
from copy import deepcopy
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor

from conf.errors import UserError
from data.batch import Batch
from models.callbacks.ema import EMA
from models.largest import largest
from models.runs.memory import shortage
from models.tasks.base import Task

AUTO = "auto"
USUAL = 64  # on a CPU, and where looking begins
ROOM = 0.9  # of the free memory may be taken


def begin(cfg: DictConfig, config: dict[str, Any], saved: dict[str, Any] | None) -> bool:
    """Gives `data.batch_size=auto` a first number in `cfg` and `config`; whether it was so.

    Args:
        saved: the configuration of the checkpoint that the run goes on from, whose number is taken; None for a new run.
    """
    if cfg.data.get("batch_size") != AUTO:
        return False
    first = USUAL if saved is None else saved["data"]["batch_size"]
    cfg.data.batch_size = config["data"]["batch_size"] = first
    return True


def bound(config: dict[str, Any], data: pl.LightningDataModule) -> None:
    """Makes the first number one that the training images and `global_batch` allow, on any device."""
    images = len(data.source.train) // max(1, _processes(config))
    data.batch_size = config["data"]["batch_size"] = rounded(min(USUAL, max(1, images)), config, _processes(config))


def settle(cfg: DictConfig, config: dict[str, Any], trainer: pl.Trainer, task: Task, data: Any) -> list[str]:
    """Looks for the largest number on a GPU and writes it everywhere; what there is to say about it.

    Weights, gradients, optimizer and randomness stay as they were: all is done on copies.

    Raises:
        UserError: several processes would find numbers of their own.
    """
    found, device = data.batch_size, trainer.strategy.root_device
    why = "on a CPU, where memory has no bound of its own"
    if device.type == "cuda":
        if trainer.world_size > 1:
            raise UserError(
                f"data: batch_size=auto looks for the largest batch on one device, got {trainer.world_size} processes; "
                "run it once with trainer.devices=1 trainer.max_steps=1, and give data.batch_size as it says"
            )
        most = min(len(data.source.train), config["global_batch"] or len(data.source.train))
        with Trial(trainer, task, data) as trial:
            if not trial.fits(found):
                found = largest(trial.fits, 1, found)
            found = rounded(largest(trial.fits, found, most), config, 1)
        why = f"the largest that {1 - ROOM:.0%} of free memory are left with"
    cfg.data.batch_size = config["data"]["batch_size"] = data.batch_size = found
    return [f"data.batch_size=auto: {found}, {why}"]


def rounded(size: int, config: dict[str, Any], processes: int) -> int:
    """The next number below that makes up `global_batch`, or that is a power of two."""
    images = config["global_batch"]
    if type(images) is int and images >= processes:
        return max(part for part in range(1, size + 1) if images % (part * processes) == 0 or part == 1)
    return 2 ** (size.bit_length() - 1)


class Trial:
    """Steps of training on a copy of a task, on its device: pass, gradient, update and average."""

    def __init__(self, trainer: pl.Trainer, task: Task, data: Any) -> None:
        self.trainer, self.data, self.device = trainer, data, trainer.strategy.root_device
        self.averaged = any(isinstance(callback, EMA) for callback in trainer.callbacks)
        self.task, self.several = task, getattr(data.source.train.labels, "ndim", 1) == 2

    def __enter__(self) -> "Trial":
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0
        self._limit = ROOM * free
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def fits(self, size: int) -> bool:
        """Whether two steps with so many images do, with some memory to spare."""
        try:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                self._steps(size)
            return self.device.type != "cuda" or torch.cuda.max_memory_reserved(self.device) <= self._limit
        except Exception as error:
            if shortage(error) is None:
                raise
            return False
        finally:
            self._let_go()

    def _steps(self, size: int) -> None:
        task = deepcopy(self.task).to(self.device).train()
        average = deepcopy(task.model) if self.averaged else None  # noqa: F841  (held while the steps are made)
        task.log = lambda *_, **__: None
        settings = {key: value for key, value in task.optimizer.items() if key != "reference_batch"}
        optimizer = task.build_optimizer(settings)
        for number in range(2):
            optimizer.zero_grad()
            with self.trainer.precision_plugin.forward_context():
                loss = task.training_step(self.batch(size, number), number)
            loss.backward()
            optimizer.step()

    def batch(self, size: int, number: int = 0) -> Batch:
        """Noise, in the form that a batch of training has."""
        sides, data = self.data.image_size, self.data
        sides = sides if isinstance(sides, tuple) else (sides, sides)
        images = torch.randn(size, data.channels, *sides, device=self.device)
        return Batch(
            images.contiguous(memory_format=torch.channels_last),
            self._labels(size),
            torch.arange(size, device=self.device),
            0,
            number,
        )

    def _labels(self, size: int) -> Tensor:
        if self.several or self.data.augment.mixes:
            return torch.full((size, self.data.num_classes), 1 / self.data.num_classes, device=self.device)
        return torch.arange(size, device=self.device) % self.data.num_classes

    def _let_go(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def _processes(config: dict[str, Any]) -> int:
    devices, nodes = config["trainer"].get("devices"), config["trainer"].get("num_nodes")
    return (devices if type(devices) is int and devices > 0 else 1) * (nodes if type(nodes) is int else 1)
