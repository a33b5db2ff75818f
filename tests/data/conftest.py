"""What the data tests share: a model that records its batches, a trainer without ornaments."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch


class Recorder(pl.LightningModule):
    """One linear layer on the mean colour; keeps (epoch, number, indices, images, labels) of all training batches.

    `save_at` maps a count of training batches to the checkpoint written after that batch.
    """

    def __init__(self, save_at: dict[int, Path] | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 10)
        self.seen, self.validated, self.save_at = [], [], save_at or {}

    def training_step(self, batch, batch_idx):
        self.seen.append(
            (batch.epoch, batch.number, batch.indices.tolist(), batch.images.clone(), batch.labels.clone())
        )
        return torch.nn.functional.cross_entropy(self.layer(batch.images.mean((2, 3))), batch.labels)

    def validation_step(self, batch, batch_idx):
        self.validated += batch.indices.tolist()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step in self.save_at:
            self.trainer.save_checkpoint(self.save_at[self.trainer.global_step])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


@pytest.fixture
def recorder():
    return Recorder


@pytest.fixture
def trainer():
    """A function that makes a CPU trainer which writes nothing."""

    def make(**options) -> pl.Trainer:
        silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        plain = {"accelerator": "cpu", "devices": 1, "use_distributed_sampler": False, "num_sanity_val_steps": 0}
        return pl.Trainer(**{**silent, **plain, "max_epochs": 2, **options})

    return make
