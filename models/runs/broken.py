"""Weights that are not finite: figures of them mean nothing, and training from them neither."""

from torch import nn

from conf.errors import UserError
from models.callbacks.finite import check_finite

RUNNING = ("running_mean", "running_var")


def refuse_broken(model: nn.Module, whose: str) -> None:
    """Looks at every weight and running statistic; masks and tables may hold infinity.

    Args:
        whose: the weights, as the message calls them.

    Raises:
        UserError: one of them is NaN or infinite.
    """
    held = dict(model.named_parameters())
    held |= {name: value for name, value in model.named_buffers() if name.endswith(RUNNING)}
    if bad := check_finite(held):
        more = f" and {len(bad) - 1} more of {len(held)} tensors" if len(bad) > 1 else ""
        raise UserError(f"{whose} must be finite, got NaN or infinity in {bad[0]}{more}; take those of an earlier step")
