"""Learning rates over the steps of a run: timm's schedules, by the step or by the epoch, in time or late."""

import math
from typing import Any

import torch
from timm.scheduler import create_scheduler_v2

from conf import values
from conf.errors import UserError

SCHEDULES = ("cosine", "constant", "step", "poly")
INTERVALS = ("step", "epoch")
EPOCHS = ("warmup_epochs", "cooldown_epochs", "decay_epochs", "late_epochs")


class Schedule:
    """A timm schedule as a function of the optimizer step alone: nothing of it is kept in checkpoints.

    Args:
        optimizer: with the learning rate to reach after the warm-up.
        settings: `sched`, `warmup_epochs`, `warmup_lr`, `min_lr`, `cooldown_epochs` and more, see conf/schedule.
            `interval`: "step", or "epoch" for one rate throughout an epoch. `late_epochs`: the schedule begins that
            much later, holds its first value until then, and is cut off at the end; it is 1 for authors whose code
            calls timm's `step(epoch)` after the epoch of that number. `warmup_prefix`: a cosine begins where the
            warm-up ends, as in ConvNeXt's code, instead of counting from the first step.
        total: steps of the run.
        per_epoch: steps of an epoch.

    The warm-up, and before it what the schedule is late, take at most half of the run, and the cooldown at most half
    of the rest, so that a short trial reaches its learning rate and spends time at it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: dict[str, Any], total: int, per_epoch: int) -> None:
        self.optimizer = optimizer
        options = {key: value for key, value in settings.items() if value is not None}
        self.every = per_epoch if options.pop("interval", "step") == "epoch" else 1
        total, epoch = math.ceil(total / self.every), per_epoch // self.every  # both in what timm counts
        warmup = min(round(options.pop("warmup_epochs", 0) * epoch), total // 2)
        self.late = min(round(options.pop("late_epochs", 0) * epoch), total // 2 - warmup)
        cooldown = min(round(options.pop("cooldown_epochs", 0) * epoch), (total - warmup) // 2)
        if "decay_epochs" in options:
            options["decay_epochs"] = max(round(options["decay_epochs"] * epoch), 1)
        if options.get("sched") == "constant":
            options |= {"sched": "cosine", "min_lr": max(group["lr"] for group in optimizer.param_groups)}
        before = warmup if options.get("warmup_prefix") else 0
        self.timm, _ = create_scheduler_v2(
            optimizer,
            num_epochs=max(total - cooldown - before, 1),
            warmup_epochs=warmup,
            cooldown_epochs=cooldown,
            updates_per_epoch=1,
            step_on_epochs=False,
            **options,
        )

    def step_update(self, step: int) -> None:
        """Sets the learning rates of the given optimizer step, 0-based."""
        self.timm.step_update(max(step // self.every - self.late, 0))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: the step decides."""


def check_schedule(settings: dict[str, Any]) -> None:
    """Finds wrong settings before anything is started.

    Raises:
        ValueError: an unknown schedule or interval, or a value of a wrong type or range.
    """
    for name in (*EPOCHS, "warmup_lr", "min_lr", "decay_rate"):
        if settings.get(name) is not None:
            check_number("schedule", name, settings[name])
    if settings.get("sched", "cosine") not in SCHEDULES:
        raise UserError(f"schedule: sched must be one of {', '.join(SCHEDULES)}, got {settings['sched']!r}")
    values.flag("schedule", "warmup_prefix", settings.get("warmup_prefix", False), fix="set schedule.warmup_prefix")
    interval = settings.get("interval", "step")
    if interval not in INTERVALS:
        raise UserError(
            f"schedule: interval must be one of {', '.join(INTERVALS)}, got {interval!r}; set schedule.interval"
        )
    for name in EPOCHS if interval == "epoch" else ():
        if (settings.get(name) or 0) % 1:
            raise UserError(
                f"schedule: {name} must be a whole number where the rate changes once per epoch, "
                f"got {settings[name]!r}; set schedule.{name}, or schedule.interval=step"
            )


def check_number(group: str, name: str, value: Any) -> None:
    """Refuses what is no number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise UserError(f"{group}: {name} must be a number of at least 0, got {value!r}; set {group}.{name}")
