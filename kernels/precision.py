"""Where half precision would change the result: a context without autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: torch.device) -> AbstractContextManager:
    """Autocast off inside; there is none to switch off on the meta device."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
