"""debug=profile, overfit and anomaly: what they leave and say."""

import json

import pytest
import torch
from torch import nn

from conf.errors import UserError
from models.callbacks.anomaly import Anomaly, tensors
from models.callbacks.guard import NonFinite
from models.loggers.metrics_csv import read_metrics

SMALL = ("model=vit_32px", "logger=none", "data.batch_size=8", "data.workers=0", "run.name=x")


def test_a_profile_is_a_table_and_a_trace(command, tmp_path):
    settings = ("trainer.limit_train_batches=3", "callbacks.profile.after=1", "callbacks.profile.steps=1")
    status, out, err = command("train", *SMALL, "debug=profile", *settings)
    assert status == 0 and "profile: outputs/x/profile.txt (Self CPU time total: " in out, err
    assert "aten::" in (tmp_path / "outputs/x/profile.txt").read_text()
    assert json.loads((tmp_path / "outputs/x/profile-trace.json").read_text())["traceEvents"]


class Broken(nn.Module):
    """Divides by what may be zero, in the forward or in the backward pass."""

    def __init__(self, backward: bool) -> None:
        super().__init__()
        self.first, self.root, self.last = nn.Linear(2, 2), Root(backward), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.root(self.first(x) * 0))


class Root(nn.Module):
    def __init__(self, backward: bool) -> None:
        super().__init__()
        self.backward_only = backward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sqrt() if self.backward_only else x / x


class Owner(nn.Module):
    """Stands for the task."""

    compiled = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@pytest.mark.parametrize(
    ("backward", "text"),
    [
        (False, r"the output of root \(Root\), whose input reaches 0, holds NaN .*before training; look there first"),
        (True, r"the gradient of the output of first \(Linear\) holds NaN"),
    ],
)
def test_the_module_that_is_not_finite_is_named(backward, text):
    owner, anomaly = Owner(Broken(backward)), Anomaly()
    anomaly.on_train_start(None, owner)
    with pytest.raises(NonFinite, match=text):
        owner.model(torch.ones(1, 2)).sum().backward()
    owner.eval()
    owner.model(torch.ones(1, 2))  # validation is not looked at
    anomaly.on_train_end(None, owner)
    owner.train()
    owner.model(torch.ones(1, 2))
    owner.compiled = True
    with pytest.raises(UserError, match=r"set task.compile=false"):
        anomaly.on_train_start(None, owner)


def test_tensors_are_found_in_any_nest():
    found = list(tensors({"a": [torch.ones(1), (torch.ones(2, dtype=torch.int64),)], "b": None}))
    assert [len(tensor) for tensor in found] == [1]


@pytest.mark.full
def test_one_batch_is_learned(command, tmp_path):
    """Forty steps of a small transformer on the same eight images: 1.78 to 1.29, where it was measured."""
    settings = ("task.label_smoothing=0", "trainer.max_epochs=40", "trainer.log_every_n_steps=1")
    status, _, err = command("train", *SMALL, "debug=overfit", *settings)
    assert status == 0, err
    losses = [
        float(row["train/loss"]) for row in read_metrics(tmp_path / "outputs/x/metrics.csv") if "train/loss" in row
    ]
    assert len(losses) == 40 and losses[-1] < 0.8 * losses[0]
