"""Dual attention: blocks alternate between attention in windows of tokens and attention among groups of channels.

Source: DaViT, Ding et al., ECCV 2022, arXiv:2204.03645, sections 3.2 and 3.3. In a channel group, in the code's names,
    o = (softmax((k s)ᵀ v) qᵀ)ᵀ,  s = D^-1/2.
The code's q, k, v are the paper's values, queries and keys; the code's names are kept so that its weights load. Windows
are not shifted and have no position bias; maps are zero-padded to whole windows, and padded tokens take part as in the
authors' code, also where the map is smaller than one window.

Shapes: B = batch, N = tokens, C = channels, M = heads or groups, D = channels per group.
"""

from torch import Tensor, nn

from conf import values
from kernels.channel_attention import channel_attention
from kernels.channel_attention import definition as channel_heads
from models.attention import Accepts, Grid, Mixed, Mixer, Runs, Site, TokenWeights
from models.attention.contract.heads import head_channels
from models.attention.contract.layout import SAME, SCATTERED
from models.attention.contract.options import check_flags
from models.attention.layouts.window import Windows
from models.attention.multihead import Core, MultiHead
from models.attention.softmax import SoftmaxCore
from models.layers.position import ConvPosition

SCALES = ("head_dim", "tokens")


def dual_attention(
    site: Site,
    *,
    window: int | tuple[int, int] = 7,
    cpe_kernel: int = 3,
    qkv_bias: bool = True,
    scale: str = "head_dim",
    backend: str = "auto",
) -> Mixer:
    """Window attention in even blocks, channel attention in odd ones; a stage of one block has windows only.

    Args:
        site: the place in the backbone; `site.block` decides which of the two it is.
        window: side of the windows in tokens, or height and width.
        cpe_kernel: side of the depth-wise convolution that is added to the input as position encoding, in backbones
            whose blocks have none of their own (DaViT's have); 0 for none.
        qkv_bias: bias of the projection.
        scale: of the channel logits, which are sums over all tokens: "head_dim" (the paper), whose logits grow with the
            map, or "tokens" (N^-1/2), which keeps their spread on every resolution.
        backend: "auto", "triton" or "torch".
    """
    size = values.pair("dual", "window", window, fix="give the side of the windows in tokens, or two")
    values.odd("dual", "cpe_kernel", cpe_kernel, or_none=True, what="odd", fix="give 3, or 0 for no position encoding")
    values.choice("dual", "scale", scale, SCALES, fix="set attention.scale")
    check_flags("dual", qkv_bias=qkv_bias)
    dim = head_channels(site)
    # channel attention alone could take class tokens, but the windows that it alternates with cannot
    options = {"accepts": Accepts(prefix="refused"), "qkv_bias": qkv_bias, "backend": backend}
    if site.block % 2:
        mixer = MultiHead(site, ChannelCore(dim, scale), **options)
    else:
        mixer = MultiHead(site, SoftmaxCore(site.num_heads, dim), layout=Windows(size), **options)
    if site.positioned or not cpe_kernel:
        return mixer
    return Positioned(site, ConvPosition(site.dim, cpe_kernel, backend), mixer)


class ChannelCore(Core):
    """Attention of the D channels of each group on one another; the sum over tokens is taken in float32."""

    keys = frozenset({SAME, SCATTERED})
    without_matrix = "the channels of a group attend to one another, not tokens"

    def __init__(self, head_dim: int, scale: str = "head_dim") -> None:
        super().__init__()
        self.head_dim, self.scale = head_dim, scale

    def runs(self, window: tuple[int, int] | None, gated: bool) -> Runs:
        """See `Core`."""
        return Runs("channel_attention", True)

    def fused(self, qkv_BNC: Tensor, grid: Grid, num_heads: int) -> Tensor:
        """(B, N, 3·M·D) → (B, N, M·D); see `Core`."""
        return channel_attention(qkv_BNC, num_heads, scale=self._scale(qkv_BNC.shape[1]))

    def forward(self, q_BMND: Tensor, k_BMND: Tensor, v_BMND: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        return channel_heads(q_BMND, k_BMND, v_BMND, self._scale(k_BMND.shape[2]))

    def _scale(self, tokens: int) -> float:
        return (self.head_dim if self.scale == "head_dim" else tokens) ** -0.5


class Positioned(Mixer):
    """A mixer with a position encoding `(x, grid) -> x` in front of it."""

    def __init__(self, site: Site, position: nn.Module, mixer: Mixer) -> None:
        super().__init__(site, mixer.backend)
        self.position, self.mixer, self.accepts = position, mixer, mixer.accepts
        self.has_matrix, self.without_matrix = mixer.has_matrix, mixer.without_matrix
        self.row_stochastic, self.adds = mixer.row_stochastic, mixer.adds

    def runs(self, gated: bool = False) -> Runs:
        """See `models.attention.Mixer`."""
        return self.mixer.runs(gated)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        return self.mixer(self.position(x_BNC, grid), grid, gates_BNM)

    def attention_matrix(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """See `MultiHead.attention_matrix`."""
        return self.mixer.attention_matrix(self.position(x_BNC, grid), grid)

    def attend(self, weights: Tensor, x_BNC: Tensor, grid: Grid) -> Tensor:
        """See `models.attention.Mixer`."""
        return self.mixer.attend(weights, self.position(x_BNC, grid), grid)

    def over_tokens(self, matrix: Tensor, x_BNC: Tensor, grid: Grid) -> TokenWeights:
        """See `models.attention.Mixer`."""
        return self.mixer.over_tokens(matrix, self.position(x_BNC, grid), grid)
