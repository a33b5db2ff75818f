"""A two-dimensional state space layer in front of the projection: a long convolution of the map with few parameters.

Source: A 2-Dimensional State Space Layer for Spatial Inductive Bias, Baron et al., ICLR 2024, arXiv:2306.06635,
equations 6 to 10. Two states of n numbers walk over the map, h along rows and v along columns:
    h[i, j] = A₁ h[i, j−1] + A₂ v[i, j−1],   v[i, j] = A₃ h[i−1, j] + A₄ v[i−1, j],   h[0, 0] = B₁,  v[0, 0] = B₂,
both halved where both exist; the kernel is (C₁ h + C₂ v) / √n, and the output the convolutions of the map from two or
four corners, summed, plus ω x.
Shapes: B = batch, N = tokens, C = channels, H W = map; n = states, G = groups, R = directions, S = R·G recurrences.
The authors derive the kernel by symbolic algebra; the recurrence gives it to rounding, along diagonals. A and B are
sigmoids; if complex, A has a modulus and an angle, 2π times a sigmoid, and the real part of the kernel is taken.
Prefix tokens are left as they are. The kernel has the size of the map in training; beyond it, it is 0.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from conf.errors import UserError
from kernels.heads import to_map, to_tokens
from kernels.precision import full_precision, wide
from models.attention.contract import Grid, Site

CORNERS = {2: ((), (-2, -1)), 4: ((), (-2,), (-1,), (-2, -1))}  # how the map is flipped for each direction
WHO = "ssm2d"


def ssm2d(
    site: Site, *, states: int = 16, groups: int = 1, directions: int = 2, complex: bool = False, norm: bool = False
) -> "StateSpace2d":
    """The layer on the tokens of a mixer.

    Args:
        site: the place in the backbone.
        states: n.
        groups: G recurrences per direction, each for C / G channels.
        directions: 2 (from two opposite corners) or 4.
        complex: complex states.
        norm: LayerNorm of what it gives.

    Raises:
        ValueError: numbers that are none, or groups that do not divide the channels.
    """
    for name, value in (("states", states), ("groups", groups)):
        values.whole(WHO, name, value, fix=f"set attention.pre.{name}")
    for name, flag in (("complex", complex), ("norm", norm)):
        values.flag(WHO, name, flag, fix=f"set attention.pre.{name}=true or false")
    if directions not in CORNERS or isinstance(directions, bool):
        values.refuse(WHO, "directions", "2 or 4", directions, "set attention.pre.directions")
    if site.dim % groups:
        raise UserError(
            f"{WHO}: groups must divide the {site.dim} channels, got {groups}; set attention.pre.groups, e.g. 1"
        )
    return StateSpace2d(site.dim, site.grid, states, groups, directions, complex, norm)


class StateSpace2d(nn.Module):
    """See the module's docstring; channel c of direction r reads recurrence (r C + c) mod S."""

    undecayed = ("A", "A_angle", "B", "C")

    def __init__(
        self, dim: int, grid: Grid, states: int, groups: int, directions: int, complex: bool, norm: bool
    ) -> None:
        super().__init__()
        self.size, self.corners, S = tuple(grid[:2]), CORNERS[directions], directions * groups
        pair = (2,) if complex else ()
        self.A = nn.Parameter(0.2 * torch.randn(4, S, states))
        self.A_angle = nn.Parameter(0.2 * torch.randn(4, S, states)) if complex else None
        self.B = nn.Parameter(0.2 * torch.randn(2, S, states, *pair))
        self.C = nn.Parameter(torch.randn(2, directions * dim, states, *pair))
        self.omega = nn.Parameter(torch.randn(dim))
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        x_BCHW = to_map(x_BNC, grid)
        with full_precision(x_BNC.device):
            x = wide(x_BCHW)
            total = x * self.omega[:, None, None]
            for flipped, kernel_CHW in zip(self.corners, self.kernel(), strict=True):
                total = total + convolved(x.flip(flipped), kernel_CHW).flip(flipped)
            y_BNC = self.norm(to_tokens(total)).to(x_BNC.dtype)
        return torch.cat([x_BNC[:, : grid.prefix], y_BNC], dim=1) if grid.prefix else y_BNC

    def kernel(self) -> Tensor:
        """(R, C, H, W), of the map in training."""
        A, B, C = wide(self.A).sigmoid(), wide(self.B).sigmoid(), wide(self.C)
        times: Callable[[Tensor, Tensor], Tensor] = torch.mul
        if self.A_angle is not None:
            angle = 2 * math.pi * wide(self.A_angle).sigmoid()
            if torch.onnx.is_in_onnx_export():  # where there are no complex numbers
                A, times = torch.cat([A * angle.cos(), A * angle.sin()], dim=-1), product_of_parts
                B, C = torch.cat(B.unbind(-1), dim=-1), torch.cat([C[..., 0], -C[..., 1]], dim=-1)
            else:
                A, B, C = torch.polar(A, angle), torch.view_as_complex(B), torch.view_as_complex(C)
        states_2HWSn = walked(A, B, *self.size, times)
        weights_2CSn = C.unflatten(1, (-1, B.shape[1]))
        kernel = torch.einsum("thwsn,tcsn->cshw", states_2HWSn, weights_2CSn) * self.A.shape[2] ** -0.5
        kernel = kernel.real if kernel.is_complex() else kernel
        return kernel.flatten(0, 1).unflatten(0, (len(self.corners), -1))


def walked(
    A: Tensor, B: Tensor, height: int, width: int, times: Callable[[Tensor, Tensor], Tensor] = torch.mul
) -> Tensor:
    """Both states on every cell, (2, H, W, S, n), diagonal after diagonal.

    Args:
        A: (4, S, n).
        B: (2, S, n), the states at the corner.
        height, width: H and W.
        times: the product of A and states.
    """
    rows = torch.arange(height, device=A.device)
    h, v = (F.pad(start[None], (0, 0, 0, 0, 0, height - 1)) for start in B)
    diagonals = [torch.stack([h, v])]
    for d in range(1, height + width - 1):
        both = ((rows > 0) & (rows < d))[:, None, None]
        factor = torch.where(both, 0.5, 1.0)
        below = F.pad((times(A[2], h) + times(A[3], v))[:-1], (0, 0, 0, 0, 1, 0))
        h, v = factor * (times(A[0], h) + times(A[1], v)), factor * below
        diagonals.append(torch.stack([h, v]))
    cells = rows[:, None] + torch.arange(width, device=A.device)
    return torch.stack(diagonals, dim=1)[:, cells, rows[:, None]]


def product_of_parts(a: Tensor, b: Tensor) -> Tensor:
    """Of complex numbers whose real parts are the first half of the last axis, and whose imaginary ones the other."""
    (real, imaginary), (of_b, beside) = a.chunk(2, dim=-1), b.chunk(2, dim=-1)
    return torch.cat([real * of_b - imaginary * beside, real * beside + imaginary * of_b], dim=-1)


def convolved(x_BCHW: Tensor, kernel_CHW: Tensor) -> Tensor:
    """Cell (i, j) gets the sum of kernel[a, b] · x[i − a, j − b], by a Fourier transform; a batch may have its own."""
    (height, width), (rows, columns) = x_BCHW.shape[2:], kernel_CHW.shape[-2:]
    if not x_BCHW.shape[0]:  # which MKL refuses
        return x_BCHW * kernel_CHW[..., :1, :1]
    size = height + rows, width + columns
    product = torch.fft.rfft2(x_BCHW, s=size) * torch.fft.rfft2(kernel_CHW, s=size)
    return torch.fft.irfft2(product, s=size)[..., :height, :width]
