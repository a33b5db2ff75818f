"""The learning rate of every step is what the authors' own loops give, and short runs reach it."""

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from timm.scheduler import CosineLRScheduler
from torch import nn

from conf.names import CONF
from models.tasks.classification import Classification
from models.tasks.schedule import Schedule
from tests.models.tasks.test_classification import OPTIMIZER, Data, Net, trainer

SETTINGS = {"sched": "cosine", "warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-5, "cooldown_epochs": 0}
BIFORMER = SETTINGS | {"interval": "epoch", "late_epochs": 1}
DAVIT = SETTINGS | {"cooldown_epochs": 10}
LR = 1e-3


def optimizer():
    return torch.optim.AdamW(nn.Linear(1, 1).parameters(), lr=LR)


def authors(**settings):
    """timm's schedule as both papers' codes make it, for 300 epochs, and the optimizer that it drives."""
    driven = optimizer()
    options = {"t_initial": 300, "lr_min": 1e-5, "warmup_t": 5, "warmup_lr_init": 1e-6, "cycle_limit": 1, **settings}
    return CosineLRScheduler(driven, **options), driven.param_groups[0]


def rates(settings, steps, total, per_epoch):
    driven = optimizer()
    schedule = Schedule(driven, settings, total, per_epoch)
    found = []
    for step in steps:
        schedule.step_update(step)
        found.append(driven.param_groups[0]["lr"])
    return found


def test_biformer_changes_its_rate_per_epoch_and_one_epoch_late():
    """The authors call `step(epoch)` after each epoch, so that two epochs run at the first rate."""
    scheduler, group = authors()
    expected = []
    for epoch in range(300):
        expected += [group["lr"]] * 3
        scheduler.step(epoch)
    assert rates(BIFORMER, range(900), total=900, per_epoch=3) == expected
    assert expected[:6] == [1e-6] * 6 and expected[6] > 1e-6
    assert expected[18] == pytest.approx(LR, rel=1e-3) and min(expected[18:]) > 1e-5


def test_davit_changes_its_rate_per_step_and_cools_down():
    """The cosine counts from the first epoch, not from the end of the warm-up; the same in fractions of an epoch."""
    scheduler, group = authors()
    per_epoch = 1251  # 1281167 images in batches of 1024
    steps = [0, 1, 5 * per_epoch - 1, 5 * per_epoch, 150 * per_epoch + 7, 300 * per_epoch - 1, 300 * per_epoch]
    steps += [305 * per_epoch, 310 * per_epoch - 1]
    expected = []
    for step in steps:
        scheduler.step(step / per_epoch)
        expected.append(group["lr"])
    found = rates(DAVIT, steps, total=310 * per_epoch, per_epoch=per_epoch)
    assert found == pytest.approx(expected, rel=1e-9)  # fractions are rounded, counts of steps are not
    assert found[0] == 1e-6 and found[-3:] == [1e-5] * 3 and found[-4] > 1e-5
    assert LR * 0.999 < found[3] < LR  # five epochs of the cosine have passed


def test_without_the_new_settings_a_schedule_counts_steps():
    scheduler, group = authors(t_initial=80, warmup_t=20, t_in_epochs=False)
    expected = []
    for step in range(100):
        scheduler.step_update(step)
        expected.append(group["lr"])
    assert rates(SETTINGS | {"cooldown_epochs": 5}, range(100), total=100, per_epoch=4) == expected
    assert (
        rates(SETTINGS | {"cooldown_epochs": 5, "interval": "step", "late_epochs": 0}, range(100), 100, 4) == expected
    )


def test_a_cosine_that_begins_behind_the_warm_up():
    """ConvNeXt's code: a line of 20 steps, then half a cosine over the other 75, then five at the end of it."""
    found = rates(SETTINGS | {"warmup_prefix": True, "cooldown_epochs": 1.25}, range(100), total=100, per_epoch=4)
    scheduler, group = authors(t_initial=75, warmup_t=0, t_in_epochs=False)
    expected = [1e-6 + step * (LR - 1e-6) / 20 for step in range(20)]
    for step in range(80):
        scheduler.step_update(step)
        expected.append(group["lr"])
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[20] == LR and found[-5:] == [1e-5] * 5 and found[-6] > 1e-5


def test_a_late_schedule_per_step_holds_its_first_value():
    late = rates(SETTINGS | {"late_epochs": 2}, range(100), total=100, per_epoch=4)
    prompt = rates(SETTINGS, range(100), total=100, per_epoch=4)
    assert late == prompt[:1] * 8 + prompt[:-8]


@pytest.mark.parametrize("unit", ["step", "epoch"])
@pytest.mark.parametrize(
    ("length", "warmup", "late"), [(1, 0, 0), (2, 1, 0), (3, 1, 0), (8, 4, 0), (11, 5, 0), (12, 5, 1), (300, 5, 1)]
)
def test_warm_up_and_delay_take_at_most_half_of_a_run(unit, length, warmup, late):
    """Five epochs of warm-up and one of delay are wanted; `length` and what remains of them in steps or epochs."""
    per_epoch = {"step": 1, "epoch": 6}[unit]
    scheduler, group = authors(t_initial=length, warmup_t=warmup)
    expected = []
    for time in range(length):
        scheduler.step(max(time - late, 0))
        expected += [group["lr"]] * per_epoch
    settings = SETTINGS | {"interval": unit, "late_epochs": 1}
    assert rates(settings, range(per_epoch * length), per_epoch * length, per_epoch) == expected
    assert max(expected) >= LR / 2


@pytest.mark.parametrize("length", [6, 10, 12, 20])
def test_a_short_run_spends_time_at_its_learning_rate(length):
    """Ten epochs of cooldown are wanted: they take at most half of what the warm-up leaves."""
    found = rates(DAVIT, range(4 * length), total=4 * length, per_epoch=4)
    assert sum(rate > LR / 4 for rate in found) >= len(found) / 4
    assert found[-1] == pytest.approx(1e-5)


def test_constant_and_step_schedules_count_epochs_too():
    constant = {"sched": "constant", "warmup_epochs": 2, "warmup_lr": 1e-6, "interval": "epoch", "late_epochs": 1}
    found = rates(constant, range(40), total=40, per_epoch=4)
    assert found[:8] == [1e-6] * 8 and found[8:12] == [pytest.approx(LR / 2, rel=2e-3)] * 4 and found[12:] == [LR] * 28
    stairs = {"sched": "step", "decay_epochs": 3, "decay_rate": 0.1, "interval": "epoch"}
    found = rates(stairs, range(24), total=24, per_epoch=4)
    assert found == [pytest.approx(LR)] * 12 + [pytest.approx(LR / 10)] * 12


@pytest.mark.parametrize("batches", [8, 7])
def test_accumulated_batches_are_no_steps(batches):
    """Four steps an epoch of eight batches in pairs, also where the last pair is incomplete."""
    seen = []

    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.append(optimizer.param_groups[0]["lr"])

    class Longer(Data):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(
                list(range(2 * batches)), batch_size=2, collate_fn=Data().train_dataloader().collate_fn
            )

    settings = SETTINGS | {"warmup_epochs": 2, "cooldown_epochs": 1, "interval": "epoch", "late_epochs": 1}
    module = Classification(
        Net(), OPTIMIZER | {"lr": LR}, settings, 4, auxiliary={"balance": {"weight": 0.0, "reduction": "sum"}}
    )
    fit = trainer(max_epochs=8, accumulate_grad_batches=2, limit_val_batches=0, callbacks=[Rates()])
    fit.fit(module, Longer())
    assert fit.global_step == 32
    assert seen == rates(settings, range(32), total=32, per_epoch=4)
    assert seen[:8] == [1e-6] * 8 and len(set(seen)) == 7


def test_a_run_can_be_limited_by_its_steps_alone():
    seen = []

    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.append(optimizer.param_groups[0]["lr"])

    settings = SETTINGS | {"interval": "epoch", "warmup_epochs": 1}
    module = Classification(Net(), OPTIMIZER | {"lr": LR}, settings, 4)
    module.auxiliary = {"balance": {"weight": 0.0, "reduction": "sum"}}
    trainer(max_epochs=-1, max_steps=10, limit_val_batches=0, callbacks=[Rates()]).fit(module, Data())
    assert seen == rates(settings, range(10), total=10, per_epoch=4)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"interval": "batch"}, r"schedule: interval must be one of step, epoch, got 'batch'; set schedule.interval"),
        ({"late_epochs": -1}, r"schedule: late_epochs must be a number of at least 0, got -1; set schedule.late_epoch"),
        ({"decay_rate": "a tenth"}, r"schedule: decay_rate must be a number of at least 0, got 'a tenth'"),
        (
            {"warmup_prefix": "no"},
            r"schedule: warmup_prefix must be true or false, got 'no'; set schedule.warmup_prefix",
        ),
        ({"late_epochs": True}, r"schedule: late_epochs must be a number of at least 0, got True"),
        (
            {"interval": "epoch", "warmup_epochs": 2.5},
            r"schedule: warmup_epochs must be a whole number where the rate changes once per epoch, got 2.5; "
            r"set schedule.warmup_epochs, or schedule.interval=step",
        ),
        ({"interval": "epoch", "late_epochs": 0.5}, r"schedule: late_epochs must be a whole number .* got 0.5"),
    ],
)
def test_wrong_settings_are_named(change, text):
    with pytest.raises(ValueError, match=text):
        Classification(Net(), OPTIMIZER, SETTINGS | change, 4)


@pytest.mark.parametrize("path", sorted((CONF / "schedule").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_schedule_of_conf_runs(path):
    settings = OmegaConf.to_container(OmegaConf.load(path))
    Classification(Net(), OPTIMIZER, settings, 4)
    assert max(rates(settings, range(80), total=80, per_epoch=4)) == pytest.approx(LR, rel=0.05)
    assert settings["interval"] == "step" and settings["late_epochs"] == 0
