"""The task: losses, metrics, optimizer groups and the schedule."""

from typing import NamedTuple

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from models.tasks.classification import Classification

OPTIMIZER = {"opt": "adamw", "lr": 1e-2, "reference_batch": None, "weight_decay": 0.05, "layer_decay": None}
SCHEDULE = {"sched": "cosine", "warmup_epochs": 1, "warmup_lr": 1e-4, "min_lr": 1e-3, "cooldown_epochs": 1}


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    epoch: int = 0
    number: int = 0


class Net(nn.Module):
    """A linear classifier that returns an auxiliary loss per "layer"."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.fc = nn.Linear(12, classes)
        self.checkpointing = None

    def forward(self, images, return_losses=False):
        logits = self.fc(images.flatten(1))
        return (
            (logits, {"balance": torch.stack([self.fc.weight.sum(), self.fc.bias.sum()])}) if return_losses else logits
        )

    def set_gradient_checkpointing(self, enabled):
        self.checkpointing = enabled

    def no_weight_decay(self):
        return set()


class Data(pl.LightningDataModule):
    batch_size = 4

    def train_dataloader(self):
        return DataLoader(
            list(range(8)), collate_fn=lambda _: Batch(torch.randn(4, 3, 2, 2), torch.arange(4)), batch_size=2
        )

    val_dataloader = train_dataloader


def task(**changes):
    settings = {"auxiliary": {"balance": {"weight": 0.5, "reduction": "sum"}}, **changes}
    return Classification(Net(), OPTIMIZER, SCHEDULE, 4, **settings)


def trainer(**settings):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(accelerator="cpu", num_sanity_val_steps=0, log_every_n_steps=1, **quiet, **settings)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_the_loss_is_smoothed_cross_entropy_plus_weighted_auxiliaries(soft, monkeypatch):
    module = task(label_smoothing=0.1)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "optimizers", lambda: torch.optim.SGD(module.parameters(), lr=1.0))
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 3])
    target = torch.rand(4, 4).softmax(1) if soft else labels
    hard = target if soft else F.one_hot(labels, 4).float()
    smoothed = 0.9 * hard + 0.1 / 4
    logits = module.model(images)
    expected = -(smoothed * logits.log_softmax(1)).sum(1).mean()
    expected = expected + 0.5 * (module.model.fc.weight.sum() + module.model.fc.bias.sum())
    torch.testing.assert_close(module.training_step(Batch(images, target), 0), expected)


def test_an_auxiliary_loss_without_a_weight_is_refused(monkeypatch):
    module = task(auxiliary={})
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    with pytest.raises(
        ValueError, match=r"auxiliary loss 'balance', which has no weight; set \+task.auxiliary.balance"
    ):
        module.training_step(Batch(torch.randn(4, 3, 2, 2), torch.arange(4)), 0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"auxiliary": {"x": {"weight": 1, "reduction": "max"}}}, r"auxiliary.x.reduction must be one of .*got 'max'"),
        ({"optimizer": {**OPTIMIZER, "lr": "fast"}}, r"optimizer: lr must be a number of at least 0, got 'fast'"),
        ({"optimizer": {**OPTIMIZER, "opt": "adamm"}}, r"optimizer: timm cannot make it"),
        ({"optimizer": {**OPTIMIZER, "betta": 1}}, r"optimizer: timm cannot make it"),
        ({"schedule": {**SCHEDULE, "sched": "cosin"}}, r"sched must be one of cosine, .*got 'cosin'"),
        ({"schedule": {**SCHEDULE, "min_lr": -1}}, r"schedule: min_lr must be a number of at least 0, got -1"),
    ],
)
def test_wrong_settings_are_named(changes, text):
    arguments = {"model": Net(), "optimizer": OPTIMIZER, "schedule": SCHEDULE, "num_classes": 4, **changes}
    with pytest.raises(ValueError, match=text):
        Classification(**arguments)


def test_learning_rate_warms_up_falls_and_stays_at_the_minimum():
    """4 epochs of 4 steps, of which 1 warms up and 1 cools down."""
    rates = []

    class Recorder(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            rates.append(module.optimizers().param_groups[0]["lr"])

    trainer(max_epochs=4, callbacks=[Recorder()]).fit(task(), Data())
    assert len(rates) == 16
    assert rates[:4] == sorted(rates[:4]) and rates[0] < 4e-3
    assert rates[4:12] == sorted(rates[4:12], reverse=True) and max(rates) <= 1e-2
    assert rates[12:] == pytest.approx([1e-3] * 4)


def test_learning_rate_scales_with_the_global_batch():
    module = Classification(
        Net(), {**OPTIMIZER, "reference_batch": 2}, {**SCHEDULE, "sched": "constant", "warmup_epochs": 0}, 4
    )
    module.auxiliary = {"balance": {"weight": 0.0, "reduction": "sum"}}
    trainer(max_epochs=1, accumulate_grad_batches=2).fit(module, Data())
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(1e-2 * 4 * 2 / 2)


def test_biases_do_not_decay():
    module = task()
    trainer(max_epochs=1, limit_val_batches=0).fit(module, Data())
    decays = {id(p): group["weight_decay"] for group in module.optimizers().param_groups for p in group["params"]}
    assert decays[id(module.model.fc.bias)] == 0 and decays[id(module.model.fc.weight)] == 0.05


def test_raw_and_averaged_weights_are_both_measured():
    module = task()
    module.ema_model = Net()
    figures = trainer().validate(module, Data(), verbose=False)[0]
    assert set(figures) == {f"val/{name}{suffix}" for name in ("top1", "loss") for suffix in ("", "_ema")}
    assert figures["val/loss"] != figures["val/loss_ema"]


def test_gradient_checkpointing_is_passed_on():
    assert task().model.checkpointing is False
    assert task(gradient_checkpointing=True).model.checkpointing is True
