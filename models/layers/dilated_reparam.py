"""A large depth-wise kernel that trains beside dilated small ones, all of which make one kernel for inference.

Source: UniRepLKNet, Ding et al., CVPR 2024, arXiv:2311.15599, section 3.1, as in OverLoCK, arXiv:2502.20087: the sum
BN(conv_K(x)) + Σ BN(conv_{k,r}(x)) over the kernels k with dilation r that the authors list for K; a dilated kernel is
a larger one with zeros in it, and a batch norm in evaluation a factor and an offset.
Shapes: B = batch, C = channels, H W = map, K = side of the kernel.
"""

import torch
from torch import Tensor, nn

from conf import values
from models.layers.folded_norms import behind

BRANCHES = {  # by K: the small kernels and their dilations
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class DilatedReparam(nn.Module):
    """(B, C, H, W) → (B, C, H, W), for any map.

    Args:
        dim: C.
        kernel: K, one of `BRANCHES`.
        deploy: the one kernel, with a bias, in the place of all; it is what `merged` gives.

    Raises:
        ValueError: another kernel.
    """

    def __init__(self, dim: int, kernel: int, deploy: bool = False) -> None:
        super().__init__()
        if kernel not in BRANCHES:
            sides = ", ".join(map(str, BRANCHES))
            values.refuse("dilated_reparam", "kernel", f"one of {sides}", kernel, "set model.kernels to such sides")
        self.large = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=deploy)
        self.norm = None if deploy else nn.BatchNorm2d(dim)
        small = {} if deploy else {f"k{k}_{r}": _branch(dim, k, r) for k, r in BRANCHES[kernel]}
        self.branches = nn.ModuleDict(small)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.large(x_BCHW)
        if self.norm is None:
            return y_BCHW
        return self.norm(y_BCHW) + sum(branch(x_BCHW) for branch in self.branches.values())

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        """The one convolution with a bias that computes the same in evaluation."""
        if self.norm is None:
            return self.large
        whole = behind(self.large, self.norm)
        for conv, norm in self.branches.values():
            one = behind(conv, norm)
            (k, _), (r, _) = conv.kernel_size, conv.dilation
            first = whole.kernel_size[0] // 2 - r * (k // 2)
            cells = slice(first, first + r * (k - 1) + 1, r)
            whole.weight[..., cells, cells] += one.weight
            whole.bias += one.bias
        return whole

    def deploy(self) -> None:
        """Makes it what it is with `deploy`, for good; it must be in evaluation."""
        self.large, self.norm, self.branches = self.merged(), None, nn.ModuleDict()


def _branch(dim: int, kernel: int, dilation: int) -> nn.Sequential:
    around = dilation * (kernel // 2)
    conv = nn.Conv2d(dim, dim, kernel, padding=around, dilation=dilation, groups=dim, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(dim))
