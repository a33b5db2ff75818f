"""Where half precision would change the result: no autocast, float32 at least, and attention written out."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(device: torch.device) -> AbstractContextManager:
    """Autocast off inside; there is none to switch off on the meta device."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_written_out(q: Tensor, bias: Tensor | None) -> bool:
    """Whether attention is written out, product by product.

    PyTorch has no fused kernel on a CPU where a bias learns, and what it does instead takes longer. Half precision is
    left to it: it keeps the logits in float32, in which large ones do not overflow.
    """
    learns = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    return learns and q.device.type == "cpu" and q.itemsize >= 4
