"""Sorting in one order everywhere: among equal numbers the one of the lowest index comes first."""

import torch
from torch import Tensor


def sorted_stably(x: Tensor, *, descending: bool = False) -> torch.return_types.sort:
    """Values and indices along the last axis.

    ONNX has no stable sort; what the other one becomes there, TopK, keeps this order by its definition.
    """
    if torch.onnx.is_in_onnx_export():
        return x.sort(dim=-1, descending=descending)
    return x.sort(dim=-1, descending=descending, stable=True)
