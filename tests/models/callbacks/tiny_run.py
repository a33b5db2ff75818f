"""A run of seconds for the tests of checkpoints and resuming: 8 batches an epoch, dropout, batch norm, a schedule.

As a script it is a whole training process: `python tiny_run.py <folder> <JSON keywords of fit>`.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from models.callbacks.checkpoint import Checkpoints
from models.callbacks.directory_io import DirectoryCheckpointIO
from models.callbacks.ema import EMA
from models.callbacks.guard import NonFiniteGuard
from models.callbacks.preemption import Preemption, Stopped
from models.callbacks.randomness import StepRandomness
from models.runs.resume import find_resume

LENGTH = 8


class TinyBatch(NamedTuple):
    x: Tensor  # (4, 6)
    y: Tensor  # (4,)
    epoch: int
    number: int


class Samples(Dataset):
    def __getitem__(self, key: tuple[int, int]) -> TinyBatch:
        generator = torch.Generator().manual_seed(1000 * key[0] + key[1])
        x = torch.randn(4, 6, generator=generator)
        return TinyBatch(x, x.sum(1).gt(0).long(), *key)


class Order(Sampler):
    """(epoch, 0), (epoch, 1), … and once, after a resume, from `start`."""

    def __init__(self) -> None:
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return LENGTH

    def __iter__(self):
        start, self.start = self.start, 0
        for number in range(start, LENGTH):
            yield self.epoch, number


class Data(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.order = Order()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Samples(), sampler=self.order, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([Samples()[9, number] for number in range(3)], batch_size=None)

    def state_dict(self) -> dict[str, int]:
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        return {"batch": 0 if progress.is_last_batch else progress.current.ready}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.order.start = state_dict["batch"]


class Task(pl.LightningModule):
    """Notes every batch it sees, and can send itself a signal or lose its numbers at a given point."""

    def __init__(self, signals: dict[str, str], nan_at: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
        self.ema_model: nn.Module | None = None
        self.signals, self.nan_at = signals, nan_at
        self.seen: list[tuple[int, int]] = []
        self.validations: list[int] = []

    def _signal(self, place: str) -> None:
        for name in self.signals.get(place, "").split():
            if name == "SIGKILL":  # what is being written then is lost; for these tests it is on the disk
                next(callback for callback in self.trainer.callbacks if isinstance(callback, Checkpoints)).saver.leave()
            os.kill(os.getpid(), getattr(signal, name))

    def training_step(self, batch: TinyBatch, batch_idx: int) -> Tensor:
        self._signal(
            f"{batch.epoch}.{batch.number}" + (f" rank {self.global_rank}" if self.trainer.world_size > 1 else "")
        )
        self.seen.append((batch.epoch, batch.number))
        loss = nn.functional.cross_entropy(self.model(batch.x), batch.y)
        return loss * float("nan") if self.nan_at == len(self.seen) else loss

    def validation_step(self, batch: TinyBatch, batch_idx: int) -> None:
        self._signal(f"val {self.trainer.current_epoch}.{batch_idx}")
        if batch_idx == 2:
            self.validations.append(self.trainer.global_step)
        self.log("val/top1", (self.model(batch.x).argmax(1) == batch.y).float().mean(), batch_size=4, sync_dist=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    folder: str | Path,
    *,
    resume: str | None = None,
    signals: dict[str, str] | None = None,
    nan_at: int | None = None,
    every: int = 3,
    epochs: int = 2,
    callbacks: tuple[pl.Callback, ...] = (),
    checkpoints: Checkpoints | None = None,
    guard: NonFiniteGuard | None = None,
    plugins: tuple = (),
    **trainer_keywords,
) -> tuple[Task, pl.Trainer]:
    task = Task(signals or {}, nan_at)
    checkpoints = checkpoints or Checkpoints(every_n_steps=every)
    checkpoints.describe_run(folder, {"seed": 3})
    keywords = {"accelerator": "cpu", "devices": 1, "max_epochs": epochs, "num_sanity_val_steps": 0, "logger": False}
    keywords |= trainer_keywords
    trainer = pl.Trainer(
        # The order is the wrong one on purpose: what saves must put itself behind what it saves.
        callbacks=[
            *(Preemption(), checkpoints, StepRandomness(seed=3), EMA(decay=0.9)),
            *(guard or NonFiniteGuard(), *callbacks),
        ],
        plugins=[DirectoryCheckpointIO(), *plugins],
        default_root_dir=folder,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **keywords,
    )
    trainer.fit(task, Data(), ckpt_path=find_resume(resume, folder))
    return task, trainer


def fingerprint(task: Task, trainer: pl.Trainer) -> dict[str, Tensor | float | int]:
    """Everything that a resumed run must have in common with an uninterrupted one."""
    result: dict[str, Tensor | float | int] = {"step": trainer.global_step, "epoch": trainer.current_epoch}
    result |= {f"model.{name}": value for name, value in task.model.state_dict().items()}
    result |= {f"ema.{name}": value for name, value in task.ema_model.state_dict().items()}
    ema, saver = (next(c for c in trainer.callbacks if isinstance(c, kind)) for kind in (EMA, Checkpoints))
    result |= {"ema updates": ema.updates, "best": saver.best_score}
    optimizer = trainer.optimizers[0].state_dict()
    for index, state in optimizer["state"].items():
        result |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    return result | {"lr": optimizer["param_groups"][0]["lr"]}


if __name__ == "__main__":
    try:
        fit(sys.argv[1], **json.loads(sys.argv[2]))
    except Stopped as stopped:
        sys.exit(stopped.status)
