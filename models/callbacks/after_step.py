"""What callbacks do once after every optimizer step, whatever the number of batches that it accumulates."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import nn


class AfterStep(Callback):
    """Calls `update(model)` with the model of the task after every optimizer step; a subclass says what that does."""

    _seen_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._seen_step:
            self._seen_step = trainer.global_step
            if not getattr(pl_module, "step_left_out", False):  # `models.callbacks.guard`: nothing has changed
                self.update(pl_module.model)

    def update(self, model: nn.Module) -> None:
        """One step."""
        raise NotImplementedError
