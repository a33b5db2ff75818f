"""InLine attention: linear attention without a quotient, and a convolution of the values that every image makes itself.

Source: Bridging the Divide: Reconsidering Softmax and Linear Attention, Han et al., NeurIPS 2024, arXiv:2412.06590,
equations 5 to 7. With φ the kernel function, s = 1 / √D, and means over the keys:
    O = s φ(Q) Kφᵀ V / N + (1 − s φ(Q)·mean φ(K)) mean V = mean V + s φ(Q) Cov(φ(K), V)
    weights of the convolution = W2 GELU(W1 mean x), 3×3 per image and channel
The second form of O is computed, in float32 at least: where keys share a large mean, the first subtracts large numbers.
Shapes: B = batch, N = tokens, S = keys, M = heads, D = channels per head, C = M·D, H W = map.
Where the authors' code decides: a class token is a key and enters the mean of x, and the convolution leaves it out; W1
and W2 act within each head; in CSWin the mean is that of the block's input before its norm (`residual_input`).
"""

from typing import Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from kernels.linear_attention import inline_attention as fused_inline_attention
from kernels.linear_attention import inline_definition as inline_heads
from kernels.precision import full_precision, wide
from models.attention import Grid, Mixer, Runs, Site
from models.attention.assemble import Composition, assemble
from models.attention.contract.heads import head_channels
from models.attention.contract.layout import SAME, SHORTENED
from models.attention.contract.options import check_flags
from models.attention.lepe import depthwise
from models.attention.multihead import Core

FEATURES = {  # φ
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "exp": lambda x: (0.2 * x).exp(),
}
INPUTS = ("normed", "stream")


def inline_attention(
    site: Site,
    *,
    feature: str = "identity",
    residual: bool = True,
    residual_input: str = "normed",
    lepe: bool = False,
    **composition: Unpack[Composition],
) -> Mixer:
    """Injective linear attention with a dynamic local residual: linear in tokens.

    Args:
        site: the place in the backbone.
        feature: the kernel function φ: "identity" (every released model), "relu", "leaky_relu" or "exp", exp(0.2 x).
        residual: add the convolution whose weights are made from the mean token.
        residual_input: of which tokens that is the mean: "normed", what the layer is given, or "stream", the input of
            the block before its norm (the authors' CSWin).
        lepe: also add a 3×3 depth-wise convolution of V with learned weights (CSWin).
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.

    Raises:
        ValueError: an unknown feature or residual_input.
    """
    who = "inline_attention"
    values.choice(who, "feature", feature, FEATURES, fix="set attention.feature")
    values.choice(who, "residual_input", residual_input, INPUTS, fix="set attention.residual_input")
    check_flags(who, residual=residual, lepe=lepe)
    dim = head_channels(site, even=residual)

    def core(num_heads: int, grid: Grid, kv_grid: Grid) -> InLineCore:
        reads_stream = residual and residual_input == "stream"
        return InLineCore(num_heads, dim, feature, residual=residual, reads_stream=reads_stream, lepe=lepe)

    return assemble(site, core, **composition)


class InLineCore(Core):
    """The covariance of keys and values, read by every query, and the convolutions of the values.

    Args:
        num_heads, head_dim: M and D.
        feature, residual, lepe: see `inline_attention`.
        reads_stream: whether `context` is to be given the input of the block instead of that of the layer.
    """

    reads_tokens = True
    row_stochastic = True
    adds = True
    keys = frozenset({SAME, SHORTENED})  # its convolutions need one map

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        feature: str = "identity",
        *,
        residual: bool = True,
        reads_stream: bool = False,
        lepe: bool = False,
    ) -> None:
        super().__init__()
        dim = num_heads * head_dim
        self.num_heads, self.scale = num_heads, head_dim**-0.5
        self.feature, self.reads_stream = feature, reads_stream
        self.residual = None
        if residual:
            # pointwise, within each head
            layers = nn.Conv1d(dim, dim, 1, groups=num_heads), nn.GELU(), nn.Conv1d(dim, 9 * dim, 1, groups=num_heads)
            self.residual = nn.Sequential(*layers)
        self.lepe = depthwise(dim, 3 if lepe else 0)

    def context(self, x_BNC: Tensor) -> dict[str, Tensor]:
        """The weights (B, C, 3, 3) of the convolution, from the mean token of each sequence."""
        if self.residual is None:
            return {}
        return {"weight_BC33": self.residual(x_BNC.mean(1).unsqueeze(2)).unflatten(1, (-1, 3, 3)).squeeze(-1)}

    def runs(self, window: tuple[int, int] | None, gated: bool) -> Runs:
        """See `models.attention.multihead.Core`."""
        if self.feature != "identity":
            return Runs("linear attention", False, f"the kernel has no feature={self.feature}")
        return Runs("linear_attention", True)

    def fused(self, qkv_BNC: Tensor, grid: Grid, num_heads: int, weight_BC33: Tensor | None = None) -> Tensor:
        """(B, N, 3·M·D) → (B, N, M·D); see `models.attention.multihead.Core`."""
        if self.lepe is not None:  # a convolution of the values with the sum of the weights is the sum of both
            given = 0 if weight_BC33 is None else weight_BC33
            weight_BC33 = (given + self.lepe.weight.squeeze(1)).expand(qkv_BNC.shape[0], -1, -1, -1)
        o_BNC = fused_inline_attention(qkv_BNC, grid, num_heads, scale=self.scale, dynamic_weight_BC33=weight_BC33)
        return o_BNC if self.lepe is None else o_BNC + self._lepe_bias(o_BNC, grid)

    def forward(
        self,
        q_BMND: Tensor,
        k_BMSD: Tensor,
        v_BMSD: Tensor,
        grid: Grid,
        kv_grid: Grid,
        weight_BC33: Tensor | None = None,
    ) -> Tensor:
        if self.feature != "identity":
            q_BMND, k_BMSD = (FEATURES[self.feature](wide(x)) for x in (q_BMND, k_BMSD))
        lepe_weight, lepe_bias = (None, None) if self.lepe is None else (self.lepe.weight, self.lepe.bias)
        return inline_heads(
            q_BMND, k_BMSD, v_BMSD, grid, kv_grid, scale=self.scale, dynamic_weight_BC33=weight_BC33,
            lepe_weight=lepe_weight, lepe_bias=lepe_bias,
        )  # fmt: skip

    def _lepe_bias(self, o_BNC: Tensor, grid: Grid) -> Tensor:
        bias_NC = self.lepe.bias.expand(grid.cells, -1)
        return F.pad(bias_NC, (0, 0, grid.prefix, 0)).to(o_BNC.dtype)

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """The weights (B, M, N, S) on the values, without the convolutions; a row sums to one, some may be negative."""
        with full_precision(q_BMND.device):
            q, k = (FEATURES[self.feature](x.float()) for x in (q_BMND, k_BMSD))
            return (1 + self.scale * q @ (k - k.mean(2, keepdim=True)).mT) / k.shape[2]
