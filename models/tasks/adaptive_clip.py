"""Adaptive gradient clipping: the gradient of each row of a weight is no longer than a share of that row.

Source: High-Performance Large-Scale Image Recognition Without Normalization, Brock et al., ICML 2021, arXiv:2102.06171,
equation 3, as timm computes it: rows no shorter than 1e-3, one row for a bias or the weights of a norm, and the
classifier like every other weight.
"""

from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from timm.utils.agc import adaptive_clip_grad

from conf.errors import UserError
from conf.values import is_number


def clip(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Shortens the gradients of all weights of an optimizer."""
    adaptive_clip_grad([weight for group in optimizer.param_groups for weight in group["params"]], share)


def check_clip(share: Any) -> None:
    """Refuses what is no positive number, and no None."""
    if share is not None and not (is_number(share, 0) and share > 0):
        raise UserError(
            f"task: adaptive_clip must be a positive number, got {share!r}; set task.adaptive_clip, or null"
        )


def check_alone(share: float | None, trainer: Any) -> None:
    """Refuses it beside the clipping of the trainer, and where a process has a share of the weights.

    Raises:
        ValueError: see above.
    """
    if share is None:
        return
    if trainer.gradient_clip_val:
        raise UserError(
            f"task: adaptive_clip must be the only clipping, got trainer.gradient_clip_val={trainer.gradient_clip_val} "
            "beside it; set one of them to null"
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise UserError(
            f"task: adaptive_clip needs all weights in every process, got {type(trainer.strategy).__name__}; set "
            "trainer.strategy=ddp, or task.adaptive_clip=null"
        )
