"""Adaptive clipping: what a step does to gradients, that it is taken instead of the trainer's, and what is refused."""

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader

from models.tasks.adaptive_clip import check_alone, clip
from models.tasks.classification import Classification

OPTIMIZER = {"opt": "momentum", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "reference_batch": None}
SCHEDULE = {"sched": "cosine", "warmup_epochs": 0, "min_lr": 1.0}


def test_rows_are_shortened_to_a_share_of_their_weights():
    weight, bias = (
        nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])),
        nn.Parameter(torch.tensor([2.0, 0.0])),
    )
    weight.grad, bias.grad = torch.tensor([[0.0, 5.0], [1.0, 0.0], [0.03, 0.04]]), torch.tensor([3.0, 4.0])
    clip(torch.optim.SGD([weight, bias], lr=1.0), 0.01)
    # 1 % of 5; of a row of zeros 1 % of 1e-3; of 10, which the gradient is below; of 2 for all of a bias
    torch.testing.assert_close(weight.grad, torch.tensor([[0.0, 0.05], [1e-5, 0.0], [0.03, 0.04]]))
    torch.testing.assert_close(bias.grad, torch.tensor([0.012, 0.016]))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, images, return_losses=False):
        logits = 100 * self.fc(images.flatten(1))
        return (logits, {}) if return_losses else logits

    def set_gradient_checkpointing(self, enabled):
        pass

    def no_weight_decay(self):
        return set()


class Data(pl.LightningDataModule):
    batch_size = 3

    def train_dataloader(self):
        batch = SimpleNamespace(images=torch.ones(3, 1, 2, 2), labels=torch.zeros(3, dtype=torch.long))
        return DataLoader([0, 1, 2], collate_fn=lambda _: batch, batch_size=3)


def step(**settings) -> float:
    """How far one step moves the longest row, in shares of its length."""
    torch.manual_seed(0)
    task = Classification(Net(), OPTIMIZER, SCHEDULE, 3, **settings)
    before = task.model.fc.weight.detach().clone()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    pl.Trainer(accelerator="cpu", max_steps=1, enable_model_summary=False, **quiet).fit(task, Data())
    return ((task.model.fc.weight.detach() - before).norm(dim=1) / before.norm(dim=1)).max().item()


def test_a_step_of_training_is_clipped_where_it_is_asked_for():
    assert step() > 1
    assert step(adaptive_clip=0.02) == pytest.approx(0.02, rel=1e-4)


def test_what_does_not_go_with_it_is_refused():
    for share in (0, -1.0, "x", True):
        with pytest.raises(
            ValueError, match=f"task: adaptive_clip must be a positive number, got {share!r}; set task.a"
        ):
            Classification(Net(), OPTIMIZER, SCHEDULE, 3, adaptive_clip=share)
    single = SingleDeviceStrategy()
    with pytest.raises(
        ValueError, match=r"task: adaptive_clip must be the only clipping, got trainer.gradient_clip_val=1"
    ):
        check_alone(0.1, SimpleNamespace(gradient_clip_val=1.0, strategy=single))
    with pytest.raises(
        ValueError, match=r"task: adaptive_clip needs all weights in every process, got SimpleNamespace; s"
    ):
        check_alone(0.1, SimpleNamespace(gradient_clip_val=None, strategy=SimpleNamespace()))
    check_alone(0.1, SimpleNamespace(gradient_clip_val=None, strategy=single))
    check_alone(None, SimpleNamespace(gradient_clip_val=1.0, strategy=SimpleNamespace()))
