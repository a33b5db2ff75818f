"""ρ of soft masks over the steps of a run: tokens see later ones at first, and in the end as little as they are to.

Source: Adapting LLaMA Decoder to Vision Transformer, Wang et al., 2024, arXiv:2404.06773, section 3.5; code:
techmonsterwang/iLLaMA, `mask_scheduler.py`: ρ is `start` in the first steps, or on a line from there that ends with
them, and afterwards what the model is made with, 0 in the paper. It is a function of the optimizer step alone: nothing
of it is kept, and a run that goes on has the ρ that it would have had. Validation measures the model as it is, and its
average with the same ρ.
"""

import math
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from conf import values
from conf.errors import UserError
from models.attention.factors.soft_mask import SoftMask

SHAPES = ("constant", "linear")


class SoftMasking(Callback):
    """Sets ρ of every `attention/factor=soft_mask` before every batch.

    Args:
        epochs: how long ρ is above its last value.
        shape: "constant", or "linear": straight down to it.
        start: ρ of the first step.

    Raises:
        ValueError: a value of another kind; in `setup` a model without soft masks.
    """

    def __init__(self, epochs: float = 50, shape: str = "constant", start: float = 1.0) -> None:
        values.number("soft_mask", "epochs", epochs, fix="set callbacks.soft_mask.epochs")
        values.choice("soft_mask", "shape", shape, SHAPES, fix="set callbacks.soft_mask.shape")
        values.fraction("soft_mask", "start", start, fix="set callbacks.soft_mask.start")
        self.epochs, self.shape, self.start = epochs, shape, start

    def rho(self, step: int, first: int, last: float) -> float:
        """At an optimizer step, 0-based, of which the `first` are above `last`."""
        if step >= first:
            return last
        done = step / max(first - 1, 1) if self.shape == "linear" else 0.0
        return self.start + (last - self.start) * done

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and not any(isinstance(module, SoftMask) for module in pl_module.model.modules()):
            raise UserError(
                "soft_mask: no mechanism of the model has a soft mask, got callbacks.soft_mask; choose "
                "attention=causal or attention/factor=soft_mask, or set callbacks.soft_mask=null"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._set(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._set(trainer, pl_module)

    def _set(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        first = round(self.epochs * per_epoch)
        for model in filter(None, (pl_module.model, getattr(pl_module, "ema_model", None))):
            for module in model.modules():
                if isinstance(module, SoftMask):
                    module.rho.fill_(self.rho(trainer.global_step, first, module.last_rho))
