"""Steps whose loss or gradient is not finite are left out: they change nothing, are said and kept, and have a limit."""

import json
import math
from copy import deepcopy

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.precision import MixedPrecision
from timm.optim import create_optimizer_v2
from torch import nn

from models.callbacks.culprit import LastPass
from models.callbacks.ema import EMA
from models.callbacks.guard import NonFinite, NonFiniteGuard
from models.callbacks.left_out import Kept
from models.checkpoints.format.directory import step_directories
from tests.models.callbacks.tiny_run import fingerprint, fit

pytestmark = pytest.mark.case(44)


class Breaks(Callback):
    """Makes steps bad, counted from 1: `loss` ones by a NaN in the weights' gradient, `gradient` ones by an inf."""

    def __init__(self, steps, where="gradient"):
        self.steps, self.where = steps, where
        self.states = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        ema = next(callback for callback in trainer.callbacks if isinstance(callback, EMA))
        now = {**pl_module.model.state_dict(), **{f"ema.{k}": v for k, v in ema.model.state_dict().items()}}
        for number, state in trainer.optimizers[0].state_dict()["state"].items():
            now |= {f"{number}.{name}": value for name, value in state.items()}
        self.states.setdefault(trainer.global_step, {name: value.clone() for name, value in now.items()})

    def on_after_backward(self, trainer, pl_module):
        if self.where == "gradient" and trainer.global_step + 1 in self.steps:
            pl_module.model[3].weight.grad[0, 0] = math.inf


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_that_is_left_out_changes_nothing(tmp_path, capsys, accumulated):
    """Neither weights nor moments, averages and running statistics; the next step does."""
    breaks = Breaks({3})
    guard = NonFiniteGuard(skip=2)
    _, trainer = fit(tmp_path, guard=guard, callbacks=(breaks,), accumulate_grad_batches=accumulated)
    assert equal(breaks.states[2], breaks.states[3]) and not equal(breaks.states[3], breaks.states[4])
    assert (guard.in_a_row, guard.left_out) == (0, 1)
    assert trainer.global_step == 16 // accumulated
    out = capsys.readouterr().out
    assert (
        "step 3, epoch 0: a gradient is NaN or infinite; the step is left out (1 in a row, 2 allowed): "
        "learning rate 0.00833; loss 0." in out
    )
    assert "in the gradient of model.3.weight" in out and "1 steps were left out, see non_finite/" in out
    kept = json.loads((tmp_path / "non_finite/step-00000003.json").read_text())
    assert kept["gradients"] == ["model.3.weight"] and kept["gradient_norm"] == "inf" and kept["rank"] == 0


def test_a_loss_without_gradient_counts_too(tmp_path, capsys):
    """`loss + nan` has a finite gradient, and no sense."""
    breaks = Breaks(set())
    fit(tmp_path, nan_at=5, guard=NonFiniteGuard(skip=2), callbacks=(breaks,))
    assert equal(breaks.states[4], breaks.states[5])
    assert "step 5, epoch 0: the training loss is NaN or infinite" in capsys.readouterr().out


@pytest.mark.parametrize("every", [2, 5])
def test_a_resumed_run_leaves_out_the_same(tmp_path, every):
    """Stopped behind the step that was left out, or before it."""
    whole = fit(tmp_path / "whole", guard=NonFiniteGuard(skip=2), callbacks=(Breaks({4}),), every=every)
    stopped = {"callbacks": (Breaks({4}),), "every": every, "max_steps": 6}
    fit(tmp_path / "parts", guard=NonFiniteGuard(skip=2), **stopped)
    guard = NonFiniteGuard(skip=2)
    path = str(tmp_path / "parts/checkpoints" / ("step-00000006" if every == 2 else "step-00000005"))
    parts = fit(tmp_path / "more", guard=guard, resume=path, callbacks=(Breaks({4}),), every=every)
    assert guard.left_out == 1
    one, other = fingerprint(*whole), fingerprint(*parts)
    differing = [name for name in one if not torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name]))]
    assert differing in ([], ["best"])  # validations are others where a run is cut by its steps


def test_too_many_in_a_row_stop_the_run(tmp_path):
    match = (
        r"NonFiniteGuard: a gradient is NaN or infinite, got it at step 6, epoch 0, learning rate .*; "
        r"the last good checkpoint is .*step-00000006; lower the rate; the last 3 steps were left out, see non_finite/"
    )
    guard = NonFiniteGuard(skip=2)
    with pytest.raises(NonFinite, match=match):
        fit(tmp_path, guard=guard, callbacks=(Breaks({1, 2, 4, 5, 6}),))
    assert guard.left_out == 5 and 6 in step_directories(tmp_path / "checkpoints")


def test_a_run_ends_badly_where_its_last_steps_are_too_many(tmp_path, capsys):
    """At its end as before it: what was reached is saved."""
    with pytest.raises(NonFinite, match=r"a gradient is .* at step 16, .*; the last 2 steps were left out"):
        fit(tmp_path, guard=NonFiniteGuard(skip=1), callbacks=(Breaks({15, 16}),))
    assert 16 in step_directories(tmp_path / "checkpoints")
    fit(tmp_path / "two", guard=NonFiniteGuard(skip=2), callbacks=(Breaks({15, 16}),))
    assert "2 steps were left out, see non_finite/" in capsys.readouterr().out


class Poison(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            with torch.no_grad():
                pl_module.model[0].weight[0, 0] = math.inf


def test_weights_that_are_broken_are_not_tried_again(tmp_path):
    with pytest.raises(NonFinite, match="the weights hold NaN or infinity, got it at step 5"):
        fit(tmp_path, guard=NonFiniteGuard(skip=10), callbacks=(Poison(),))
    assert list(step_directories(tmp_path / "checkpoints")) == [3]


def test_averages_that_are_broken_are_not_saved(tmp_path):
    class Spoil(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 4:
                pl_module.ema_model[0].weight[0, 0] = math.nan

    with pytest.raises(NonFinite, match="the averaged weights hold NaN or infinity, got it at step 6"):
        fit(tmp_path, guard=NonFiniteGuard(skip=10), callbacks=(Spoil(),))
    assert list(step_directories(tmp_path / "checkpoints")) == [3]


def test_the_scaler_skips_steps_of_its_own(tmp_path):
    """They are no fault while its scale is above 1, and the scale is logged."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    guard = NonFiniteGuard(skip=2)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    _, trainer = fit(tmp_path, guard=guard, callbacks=(Breaks({2, 3, 4}),), plugins=(precision,), log_every_n_steps=1)
    assert scaler.get_scale() == 0.5 and guard.left_out == 1  # 4, 2: the scaler's; at 1 it is the gradient's own
    assert float(trainer.callback_metrics["train/loss_scale"]) == 0.5


class Divides(nn.Module):
    def forward(self, x):
        return x / x.sum(1, keepdim=True)


def test_the_module_and_the_image_are_named():
    model = nn.Sequential(nn.Linear(2, 2), Divides(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.zero_()
    last = LastPass(model)
    model(torch.tensor([[1.0, 2.0], [1.0, -1.0]])).sum().backward()
    found = last.first_bad(torch.enable_grad)
    assert found.where == "the output of 1 (Divides), whose input reaches 2"
    assert found.rows.tolist() == [False, True]
    last.remove()
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_gradient_is_followed_back():
    class Root(nn.Module):
        def forward(self, x):
            return x.sqrt()

    model = nn.Sequential(nn.Linear(2, 2), Root(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.zero_(), model[0].bias.zero_()
    last = LastPass(model)
    model(torch.ones(3, 2)).sum().backward()
    before = [weight.grad.clone() for weight in model.parameters()]
    assert last.first_bad(torch.enable_grad).where == "the gradient of the output of 0 (Linear)"
    same = [
        torch.equal(
            a,
            b.grad,
        )
        or a.isnan().any()
        for a, b in zip(before, model.parameters(), strict=True)
    ]
    assert all(same)


def test_a_loss_is_named_where_the_model_is_fine():
    last = LastPass(model := nn.Linear(2, 2))
    (model(torch.ones(3, 2)).sum() * math.nan).backward()
    assert last.first_bad(torch.enable_grad).where == "the loss of outputs that are finite"
    last.forget()
    assert last.first_bad(torch.enable_grad) == (None, None)


def test_counters_of_an_optimizer_are_put_back():
    norm = nn.BatchNorm1d(2)
    kept = Kept(norm)
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    optimizer.param_groups[0]["step"] = 3
    kept.keep()
    norm(torch.full((4, 2), math.nan)).sum().backward()
    assert norm.running_mean.isnan().all()
    kept.leave_out(optimizer)
    assert norm.running_mean.eq(0).all() and norm.num_batches_tracked == 0 and norm.weight.grad is None
    optimizer.param_groups[0].update(step=4, lr=0.05)
    kept.after(optimizer)
    assert optimizer.param_groups[0]["step"] == 3 and optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion", "adafactor", "lookahead_adamw", "adopt", "nadamw"])
def test_optimizers_change_nothing_without_gradients(name):
    """Of timm's: those that count steps in their groups too."""
    model = nn.Linear(3, 2)
    optimizer, kept = create_optimizer_v2(model, opt=name, lr=0.1, weight_decay=0.1), Kept(model)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        if step == 2:
            before = deepcopy((model.state_dict(), optimizer.state_dict()))
            kept.leave_out(optimizer)
        optimizer.step()
    kept.after(optimizer)
    assert equal(before[0], model.state_dict()) and str(before[1]) == str(optimizer.state_dict())


@pytest.mark.parametrize("value", [-1, 2.5, True])
def test_the_limit_is_checked(value):
    with pytest.raises(ValueError, match="NonFiniteGuard: skip must be a whole number of at least 0, got"):
        NonFiniteGuard(skip=value)
