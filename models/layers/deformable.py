"""Between two stages: a deformable 2×2 convolution with stride 2, whose cells are where the tokens say.

Source: LIT, Pan et al., AAAI 2022, arXiv:2105.14217, section 3.3: deformable token merging; DCN, Dai et al., ICCV 2017,
arXiv:1703.06211, equations 2 and 3 (bilinear, zero outside the map). As in the authors' code batch norm and GELU stand
behind it. They train the offsets with a tenth of the learning rate; the optimizers here have rates by depth alone
(`optimizer.layer_decay`), so they are trained with that of the other weights of the place.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula
from torchvision.ops import deform_conv2d

from models.layers.downsample import reduced
from models.layers.norm import TokenBatchNorm
from models.layers.tokens import completed, to_map, to_tokens

SIDE = 2  # of the kernel, and its stride


class DeformableDownsample(nn.Module):
    """Half the map: (x_BNC, grid) → (x_BNC, grid). The offsets start at zero, as an ordinary convolution.

    Maps with odd sides are zero-padded at the bottom and right.

    Args:
        dim, out_dim: channels before and after.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(dim, 2 * SIDE * SIDE, SIDE, stride=SIDE)
        self.conv = nn.Conv2d(dim, out_dim, SIDE, stride=SIDE)
        self.norm = TokenBatchNorm(out_dim)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, tuple]:
        x_BCHW = completed(to_map(x_BNC, grid), (0, grid.width % SIDE, 0, grid.height % SIDE))
        # torchvision has it for 32 bits and more alone
        exact = torch.promote_types(x_BCHW.dtype, torch.float32)
        parts = (x_BCHW, self.offset(x_BCHW), self.conv.weight, self.conv.bias)
        y_BCHW = deform_conv2d(*(part.to(exact) for part in parts), stride=SIDE)
        return F.gelu(self.norm(to_tokens(y_BCHW).to(x_BNC.dtype))), reduced(grid, SIDE)


@register_flop_formula(torch.ops.torchvision.deform_conv2d)
def _flops(x_shape: Any, weight_shape: Any, offset_shape: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    """Those of the same convolution without offsets; where its cells lie is interpolated, which is not counted."""
    batch, out_dim, height, width = out_shape
    dim, *kernel = weight_shape[1:]
    return 2 * batch * height * width * out_dim * dim * kernel[0] * kernel[1]
