"""Lightweight and dynamic convolutions: few kernels of weights that sum to one, shared by the channels of a head.

Source: Pay Less Attention with Lightweight and Dynamic Convolutions, Wu et al., ICLR 2019, arXiv:1901.10430, sections
3 and 4: y = W_o conv(GLU(W_i x)), where a head's kernel is softmax(w), the same everywhere (lightweight), or
softmax(W x_n), predicted for each token n of that token alone (dynamic). The paper's are along sequences; here they are
K × K on the map, and what lies beyond it is left out of the softmax unless `renorm` is false, as in the authors' code.
Shapes: B = batch, N = H·W tokens, C = channels, M = heads, D = channels per head, K = weights of a kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.contract import Accepts, Grid, Mixed, Mixer, Site
from models.attention.contract.explaining import is_explaining, note
from models.attention.contract.heads import gated_heads, head_channels, merge_heads, split_heads
from models.attention.contract.options import check_flags, check_odd
from models.layers.tokens import to_map, to_tokens


class LightConv(Mixer):
    """The lightweight convolution, (B, N, C) → (B, N, C), for any map.

    Args:
        site: the place in the backbone.
        kernel_size: side of the kernel, odd.
        renorm: weights inside of the map sum to one at its border too; false: what lies beyond counts as zeros.
        backend: "auto" or "torch"; there is no kernel.
    """

    accepts = Accepts(prefix="refused")
    has_matrix = True
    dynamic = False

    def __init__(self, site: Site, *, kernel_size: int = 7, renorm: bool = True, backend: str = "auto") -> None:
        who = "dynamic_conv" if self.dynamic else "light_conv"
        check_odd(who, kernel_size=kernel_size)
        check_flags(who, renorm=renorm)
        inner = site.num_heads * head_channels(site)
        super().__init__(site, backend)
        self.row_stochastic = renorm
        self.linear1 = nn.Linear(site.dim, 2 * inner)
        conv = DynamicKernel if self.dynamic else LightKernel
        self.conv = conv(inner, site.num_heads, (kernel_size, kernel_size), renorm)
        self.linear2 = nn.Linear(inner, site.dim)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        v_BNC = F.glu(self.linear1(x_BNC))
        if is_explaining():
            y_BNC = self._weighed(note(self, self.conv.matrix(v_BNC, grid)), v_BNC)
        else:
            y_BNC = self.conv(v_BNC, grid)
        return Mixed(self.linear2(gated_heads(y_BNC, gates_BNM)), {})

    def attention_matrix(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """The kernels as weights (B, M, N, N) of every token on those around it."""
        return self.conv.matrix(F.glu(self.linear1(x_BNC)), grid)

    def attend(self, weights: Tensor, x_BNC: Tensor, grid: Grid) -> Tensor:
        """See `models.attention.Mixer`."""
        return self.linear2(self._weighed(weights, F.glu(self.linear1(x_BNC))))

    def _weighed(self, weights_BMNN: Tensor, v_BNC: Tensor) -> Tensor:
        v_BMND = split_heads(v_BNC, 1, self.site.num_heads)[0]
        return merge_heads(weights_BMNN.to(v_BMND.dtype) @ v_BMND)


class DynamicConv(LightConv):
    """The dynamic convolution, whose kernels each token predicts; options as of `LightConv`."""

    dynamic = True


class LightKernel(nn.Module):
    """softmax(w) for each head: `(x_BNC, grid) -> (B, N, C)`.

    Args:
        dim: C.
        num_heads: M.
        kernel: its height and width.
        renorm: see `LightConv`.
        bias: of each channel, behind it.
    """

    def __init__(self, dim: int, num_heads: int, kernel: tuple[int, int], renorm: bool, bias: bool = False) -> None:
        super().__init__()
        self.num_heads, self.kernel, self.renorm = num_heads, kernel, renorm
        self.padding = (kernel[0] // 2, kernel[1] // 2)
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self._weigh(dim, kernel[0] * kernel[1])

    def _weigh(self, dim: int, places: int) -> None:
        self.weight = nn.Parameter(torch.empty(self.num_heads, places))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        y_BNC = self._convolved(x_BNC, grid)
        return y_BNC if self.bias is None else y_BNC + self.bias.to(y_BNC.dtype)

    def weights(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """The kernel of every head at every token, (B, N, M, K)."""
        logits_BNMK = self._logits(x_BNC)
        if self.renorm:
            inside_NK = self._around(x_BNC.new_ones(1, 1, *grid[:2]))[0].mT > 0
            logits_BNMK = logits_BNMK.masked_fill(~inside_NK[:, None], float("-inf"))
        return logits_BNMK.softmax(-1)

    def matrix(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """The same on the tokens, (B, M, N, N); what lies beyond the map is left out."""
        number = torch.arange(1.0, grid.cells + 1, dtype=torch.float64, device=x_BNC.device)
        at_NK = self._around(number.view(1, 1, *grid[:2]))[0].mT.long()  # 0 beyond the map
        weights_BMNK = self.weights(x_BNC, grid).transpose(1, 2)
        spread = weights_BMNK.new_zeros(*weights_BMNK.shape[:3], grid.cells + 1)
        return spread.scatter_add(-1, at_NK.expand_as(weights_BMNK), weights_BMNK)[..., 1:]

    def _around(self, x_BCHW: Tensor) -> Tensor:
        """What stands around every token, zeros beyond the map: (B, C·K, N)."""
        return F.unfold(x_BCHW, self.kernel, padding=self.padding)

    def _logits(self, x_BNC: Tensor) -> Tensor:
        return self.weight.to(x_BNC.dtype).expand(*x_BNC.shape[:2], -1, -1)

    def _convolved(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """A depth-wise convolution, divided by what the same gives of ones."""
        x_BCHW, each = to_map(x_BNC, grid), x_BNC.shape[-1] // self.num_heads
        kernel = self.weight.softmax(-1).unflatten(1, (1, *self.kernel)).to(x_BNC.dtype)
        y_BCHW = F.conv2d(x_BCHW, kernel.repeat_interleave(each, 0), padding=self.padding, groups=x_BNC.shape[-1])
        if self.renorm:
            inside_1MHW = F.conv2d(x_BCHW.new_ones(1, 1, *grid[:2]), kernel, padding=self.padding)
            y_BCHW = y_BCHW / inside_1MHW.repeat_interleave(each, 1)
        return to_tokens(y_BCHW)


class DynamicKernel(LightKernel):
    """softmax(W x_n) for each head and token; what it weighs is written out, (B, C, K, N) numbers."""

    def _weigh(self, dim: int, places: int) -> None:
        self.weight_linear = nn.Linear(dim, self.num_heads * places, bias=False)
        nn.init.xavier_uniform_(self.weight_linear.weight)

    def _logits(self, x_BNC: Tensor) -> Tensor:
        return self.weight_linear(x_BNC).unflatten(-1, (self.num_heads, -1))

    def _convolved(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        weights_BNMK = self.weights(x_BNC, grid)
        around_BMDKN = self._around(to_map(x_BNC, grid)).unflatten(1, (self.num_heads, -1, weights_BNMK.shape[-1]))
        return torch.einsum("bmdkn,bnmk->bnmd", around_BMDKN, weights_BNMK).flatten(2)
