"""A reading of the HyperZZW operator: kernels that a network makes of coordinates, times what they are to convolve.

Source: HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context Interaction (Terminator), Zhang, 2024,
arXiv:2401.17948. There is no released code; as the abstract has it, a slow network W of coordinates makes
hyper-kernels, element-wise products with the activations Z make these depend on the context, and Z is convolved with
the products; kernels of several sizes give branches, which a bottleneck joins:
    y = W₂ [standardised(Z ∗ (Z ⊙ W(map))), standardised(Z ∗ (pooled(Z) ⊙ W(k × k)))],   Z = W₁ x.
A kernel of k × k takes the activations pooled to as many cells. The slow network is a product of sines,
h ← (A h + b) ⊙ sin(F c + φ), of coordinates c from -1 to 1. Branches are standardised over the map and all channels, as
features with zero mean are what the paper asks for; its local loss for the slow network is left out.
Shapes: B = batch, N = H·W tokens, C = channels, M = heads, H W = map, F = features of the slow network.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.precision import full_precision, wide
from models.attention import Accepts, Grid, Mixed, Mixer, Site
from models.attention.contract.heads import gated_heads, head_channels
from models.attention.contract.options import check_odd, check_whole
from models.attention.pres.ssm2d import convolved
from models.layers.tokens import to_map, to_tokens


class HyperKernel(Mixer):
    """(B, N, C) → (B, N, C), for any map. Gates (B, N, M) weight the channels of each head in both branches.

    Args:
        site: the place in the backbone.
        kernel_size: k, side of the small kernel, odd.
        hidden, layers: features and products of the slow network.
        backend: "auto" or "torch"; there is no kernel.
    """

    accepts = Accepts(prefix="refused")
    without_matrix = "each channel has a kernel of its own, and what comes of it is standardised"

    def __init__(
        self, site: Site, *, kernel_size: int = 7, hidden: int = 32, layers: int = 2, backend: str = "auto"
    ) -> None:
        check_odd("hyper_kernel", kernel_size=kernel_size)
        check_whole("hyper_kernel", hidden=hidden, layers=layers)
        super().__init__(site, backend)
        head_channels(site, even=True)
        self.sides, dim = (kernel_size, kernel_size), site.dim
        self.linear = nn.Linear(dim, dim)
        self.of_map, self.of_window = (SlowNetwork(dim, hidden, layers) for _ in range(2))
        self.bottleneck = nn.Linear(2 * dim, dim)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        z_BCHW = to_map(self.linear(x_BNC), grid)
        with full_precision(x_BNC.device):
            branches = [standardised(self.branch(wide(z_BCHW), of_map)) for of_map in (True, False)]
        tokens = [gated_heads(to_tokens(branch).to(x_BNC.dtype), gates_BNM) for branch in branches]
        return Mixed(self.bottleneck(torch.cat(tokens, dim=-1)), {})

    def branch(self, z_BCHW: Tensor, of_map: bool) -> Tensor:
        """Z convolved with its own product with the hyper-kernel of the map, or of the window."""
        if of_map:
            return centred(z_BCHW, z_BCHW * self.of_map(z_BCHW.shape[2:]))
        return centred(z_BCHW, F.adaptive_avg_pool2d(z_BCHW, self.sides) * self.of_window(self.sides))


class SlowNetwork(nn.Module):
    """From coordinates to a hyper-kernel: `(sides) -> (C, H, W)`, for any sides.

    Args:
        dim: C.
        hidden: F.
        layers: products of sines, besides the first.
    """

    undecayed = ("frequency", "phase", "bias")

    def __init__(self, dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.frequency = nn.Parameter(math.pi * torch.randn(layers + 1, hidden, 2))
        self.phase = nn.Parameter(math.pi * (2 * torch.rand(layers + 1, hidden) - 1))
        spread = (2 / hidden) ** 0.5  # kernels then have a mean square of one
        self.weight = nn.Parameter(spread * torch.randn(layers, hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(layers, hidden))
        self.out_weight = nn.Parameter(spread * torch.randn(dim, hidden))
        self.out_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, sides: tuple[int, int]) -> Tensor:
        h_NF, *filters = self.sines(sides)
        for weight_FF, bias_F, sines_NF in zip(wide(self.weight), wide(self.bias), filters, strict=True):
            h_NF = F.linear(h_NF, weight_FF, bias_F) * sines_NF
        kernel_NC = F.linear(h_NF, wide(self.out_weight), wide(self.out_bias))
        return kernel_NC.mT.unflatten(1, tuple(sides))

    def sines(self, sides: tuple[int, int]) -> Tensor:
        """(layers + 1, H·W, F): sin(F c + φ) at every cell."""
        c_N2 = coordinates(sides, self.frequency)
        return (c_N2 @ wide(self.frequency).mT + wide(self.phase)[:, None]).sin()


def coordinates(sides: tuple[int, int], like: Tensor) -> Tensor:
    """(H·W, 2), both from -1 to 1; 0 along a side of one cell."""
    axes = [
        torch.linspace(-1, 1, side, device=like.device) if side > 1 else torch.zeros(1, device=like.device)
        for side in sides
    ]
    return wide(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1).to(like.dtype))


def centred(z_BCHW: Tensor, kernel_BCHW: Tensor) -> Tensor:
    """Every channel convolved with a kernel of its own, whose middle cell is the offset 0; zeros beyond the map."""
    rows, columns = (side // 2 for side in kernel_BCHW.shape[2:])
    return convolved(F.pad(z_BCHW, (0, columns, 0, rows)), kernel_BCHW)[..., rows:, columns:]


def standardised(z_BCHW: Tensor) -> Tensor:
    """With mean 0 and variance 1 over map and channels."""
    return F.group_norm(z_BCHW, 1)
