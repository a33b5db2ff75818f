"""Which tensors hold NaN or infinity."""

from collections.abc import Mapping

import torch
from torch import Tensor


def check_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity, in their order; one synchronisation for each device.

    Whole numbers and truth values are always finite. Tensors that are empty or on `meta` are left out.
    """
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if (value.is_floating_point() or value.is_complex()) and value.numel() and value.element_size() > 1:
            by_device.setdefault(value.device, {})[name] = value.detach()
    bad = set()
    for device, values in by_device.items():
        if device.type != "meta":
            finite = torch.stack([torch.isfinite(value).all() for value in values.values()]).tolist()
            bad |= {name for name, fine in zip(values, finite, strict=True) if not fine}
    return [name for name in tensors if name in bad]
