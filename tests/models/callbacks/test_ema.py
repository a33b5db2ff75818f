"""The average follows its formula bit for bit and leaves the trained weights alone."""

from copy import deepcopy

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from timm.utils import ModelEmaV3
from torch import nn

from models.callbacks.ema import EMA
from models.callbacks.preemption import Stopped
from tests.models.callbacks.tiny_run import Task, fingerprint, fit


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def drift(network):
    """Changes every parameter and buffer, the integer counter of the normalisation too."""
    with torch.no_grad():
        for value in network.state_dict().values():
            value += torch.randn_like(value) if value.is_floating_point() else 1


def attached(network, **keywords):
    ema = EMA(**keywords)
    task = Task({}, None)
    task.model = network
    ema.setup(None, task, "fit")
    return ema


@pytest.mark.parametrize("warmup", [True, False])
def test_equals_the_formula_and_timm_over_five_steps(warmup):
    network = model()
    ema = attached(network, decay=0.6, warmup=warmup, gamma=2.0, power=0.7)
    theirs = ModelEmaV3(network, decay=0.6, use_warmup=warmup, warmup_gamma=2.0, warmup_power=0.7)
    expected = {name: value.clone() for name, value in network.state_dict().items()}
    for step in range(1, 6):
        drift(network)
        ema.update(network)
        theirs.update(network, step=step)
        decay = 0.0 if step == 1 else min(1 - (1 + (step - 1) / 2.0) ** -0.7, 0.6) if warmup else 0.6
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                expected[name] = torch.lerp(expected[name], value, 1.0 - decay)
            else:
                expected[name] = value.clone()
        for name, value in ema.model.state_dict().items():
            for other in (expected, theirs.module.state_dict()):  # a rounding per step
                torch.testing.assert_close(value, other[name], rtol=1e-6, atol=1e-7, msg=name)
    assert ema.updates == 5


def test_the_decay_warms_up_to_its_final_value():
    decays = [EMA(decay=0.999).decay_at(n) for n in (1, 2, 10, 1000, 10**6)]
    assert decays[0] == 0 and decays == sorted(decays) and decays[-1] == 0.999 and decays[3] < 0.999


def test_it_is_no_part_of_the_task(tmp_path):
    class Check(Callback):
        def on_train_start(self, trainer, pl_module):
            self.names = set(pl_module.state_dict())
            self.modules = list(pl_module.modules())
            self.average = pl_module.ema_model

    check = Check()
    task, _ = fit(tmp_path, max_steps=2, callbacks=(check,))
    assert all(name.startswith("model.") for name in check.names)
    assert check.average not in check.modules and task.ema_model is check.average
    assert not check.average.training and not any(p.requires_grad for p in check.average.parameters())


def test_the_trained_weights_are_untouched(tmp_path):
    with_average = fingerprint(*fit(tmp_path / "with"))
    raw = {name: value for name, value in with_average.items() if name.startswith("model.")}
    task, _ = fit(tmp_path / "without", callbacks=(NoUpdates(),))
    assert all(torch.equal(raw[f"model.{name}"], value) for name, value in task.model.state_dict().items())


class NoUpdates(Callback):
    """Switches the averaging off, with everything else as it was."""

    def setup(self, trainer, pl_module, stage):
        next(c for c in trainer.callbacks if isinstance(c, EMA)).update = lambda model: None


@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_update_per_optimizer_step(tmp_path, accumulate):
    _, trainer = fit(tmp_path, accumulate_grad_batches=accumulate, epochs=1)
    ema = next(c for c in trainer.callbacks if isinstance(c, EMA))
    assert ema.updates == trainer.global_step == -(-8 // accumulate)


def test_resuming_continues_the_average_and_its_count(tmp_path):
    whole = fingerprint(*fit(tmp_path / "whole"))
    with pytest.raises(Stopped):
        fit(tmp_path / "parts", signals={"0.5": "SIGTERM"})
    parts = fingerprint(*fit(tmp_path / "parts", resume="auto"))
    assert parts["ema updates"] == whole["ema updates"] == 16
    assert all(torch.equal(parts[name], value) for name, value in whole.items() if name.startswith("ema."))


def test_a_checkpoint_without_an_average_is_refused(tmp_path):
    ema = attached(model())
    with pytest.raises(
        ValueError, match="EMA: a run can be resumed with an average only if it had one, got a checkpoint"
    ):
        ema.on_load_checkpoint(None, None, {"state_dict": {}})


def test_half_precision_parameters_are_refused():
    with pytest.raises(ValueError, match=r"at least 32 bits, got 0\.weight in torch\.bfloat16; use trainer\.precision"):
        attached(model().bfloat16())


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"decay": -0.1}, r"decay must be in \[0, 1\), got -0.1"),
        ({"gamma": 0}, "gamma and power must be greater than 0, got 0 and"),
        ({"power": -1}, "gamma and power must be greater than 0, got 1.0 and -1"),
    ],
)
def test_arguments_are_checked(keywords, match):
    with pytest.raises(ValueError, match=f"EMA: {match}"):
        EMA(**keywords)


def test_the_model_is_copied_not_shared():
    network = model()
    before = deepcopy(network.state_dict())
    ema = attached(network)
    drift(network)
    assert all(torch.equal(ema.model.state_dict()[name], value) for name, value in before.items())
