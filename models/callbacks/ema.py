"""Keeps an exponential moving average of the weights beside the model, to be evaluated beside it.

With decay d after the n-th optimizer step: ema ← d_n · ema + (1 − d_n) · weights. The first update copies the weights
(d_1 = 0). With warm-up d_n = min(d, 1 − (1 + (n − 1) / gamma)^−power), which lets short runs profit too.

Source: the schedule of timm's `ModelEmaV3` (its `update(model, step)`), after Katherine Crowson's formula; equal bits.
Raw and averaged weights are never swapped: a stopped run cannot confuse them, and both are evaluated.
"""

from copy import deepcopy
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import nn

from conf.errors import UserError
from models.callbacks.after_step import AfterStep
from models.callbacks.directory_io import EMA_KEY
from models.callbacks.left_out import local


class EMA(AfterStep):
    """Averages parameters and buffers of `task.model` after every optimizer step.

    Args:
        decay: the final decay, in [0, 1).
        warmup: raise the decay slowly to its final value.
        gamma, power: the shape of the warm-up.

    The average is `ema.model`, and `task.ema_model` during fit: the task evaluates it where it finds it. It is no
    submodule of the task, so it is in neither its parameters nor its state.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True, gamma: float = 1.0, power: float = 2 / 3) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"EMA: decay must be in [0, 1), got {decay!r}")
        if gamma <= 0 or power <= 0:
            raise UserError(f"EMA: gamma and power must be greater than 0, got {gamma!r} and {power!r}")
        self.decay, self.warmup, self.gamma, self.power = decay, warmup, gamma, power
        self.model: nn.Module | None = None
        self.updates = 0

    def decay_at(self, update: int) -> float:
        """The decay of the n-th update, n = 1, 2, …"""
        if update <= 1:
            return 0.0
        if not self.warmup:
            return self.decay
        return min(1 - (1 + (update - 1) / self.gamma) ** -self.power, self.decay)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copies the model.

        Raises:
            ValueError: parameters have half precision, in which an update of 1 − decay is lost.
        """
        if stage != "fit":
            return
        for name, value in pl_module.model.named_parameters():
            if value.dtype in (torch.bfloat16, torch.float16):
                raise UserError(
                    f"EMA: parameters must have at least 32 bits, got {name} in {value.dtype}; use "
                    "trainer.precision=bf16-mixed or 16-mixed, or switch EMA off"
                )
        self.model = deepcopy(pl_module.model).eval().requires_grad_(False)
        if getattr(pl_module, "compiled", False):
            self.model.compile()  # a copy loses it
        self.updates = 0
        # Past nn.Module's own attribute handling, which would register the average as a part of the task.
        object.__setattr__(pl_module, "ema_model", self.model)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.model.to(pl_module.device)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Every process measures the same average: running statistics differ between them, rank 0's are saved."""
        if trainer.world_size > 1 and trainer.state.fn == "fit":
            for buffer in self.model.buffers():
                dist.broadcast(buffer, src=0)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step of the average: floating-point tensors are averaged, the others (counters, indices) copied."""
        self.updates += 1
        averaged, new = [], []
        for mean, value in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if mean.is_floating_point():
                averaged.append(local(mean))
                new.append(local(value))
            else:
                mean.copy_(value)
        torch._foreach_lerp_(averaged, new, weight=1.0 - self.decay_at(self.updates))

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        checkpoint[EMA_KEY] = self.model.state_dict()

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        if self.model is None:
            return
        if EMA_KEY not in checkpoint:
            raise UserError(
                "EMA: a run can be resumed with an average only if it had one, got a checkpoint without averaged "
                "weights; switch EMA off, or start a new run from these weights"
            )
        if checkpoint[EMA_KEY]:  # of shares it is empty: the engine reads them into their place
            self.model.load_state_dict(checkpoint[EMA_KEY])
