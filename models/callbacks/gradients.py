"""The norm of a gradient, also of one whose parts are spread over processes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Of all together; where there are shares, all processes must ask."""
    kinds = [[value for value in gradients if hasattr(value, "full_tensor") is spread] for spread in (True, False)]
    norms = [get_total_norm(kind) for kind in kinds if kind]
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
