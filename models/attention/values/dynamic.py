"""A convolution of the values whose weights every image makes itself, beside the attention.

Source: Bridging the Divide: Reconsidering Softmax and Linear Attention, Han et al., NeurIPS 2024, arXiv:2412.06590,
equation 7: 3×3 weights for every channel, W2 GELU(W1 mean), within each head.
Shapes: B = batch, M = heads, N = queries, S = keys, D = channels per head, C = M·D.
InLine takes the mean of the layer's input; a part is given the values, so it is their mean here, with prefix tokens.
Prefix tokens get nothing. Values of a smaller map are enlarged bilinearly first.
"""

from torch import Tensor, nn

from kernels.linear_attention import inline_local
from models.attention.contract import Grid, Site
from models.attention.contract.heads import head_channels, merge_heads


def dynamic(site: Site) -> "DynamicDepthwise":
    """A dynamic 3×3 convolution.

    Args:
        site: the place in the backbone.
    """
    return DynamicDepthwise(site.num_heads, head_channels(site))


class DynamicDepthwise(nn.Module):
    """What is added to the heads, (B, M, N, D)."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        dim = num_heads * head_dim
        layers = nn.Conv1d(dim, dim, 1, groups=num_heads), nn.GELU(), nn.Conv1d(dim, 9 * dim, 1, groups=num_heads)
        self.weights = nn.Sequential(*layers)

    def forward(self, v_BMSD: Tensor, kv_grid: Grid, grid: Grid) -> Tensor:
        mean_BC1 = merge_heads(v_BMSD).mean(1).unsqueeze(2)
        weight_BC33 = self.weights(mean_BC1).unflatten(1, (-1, 3, 3)).squeeze(-1)
        return inline_local(v_BMSD, grid, kv_grid, weight_BC33)
