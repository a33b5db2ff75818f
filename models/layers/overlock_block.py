"""The blocks of OverLoCK: large kernels alone, and a mixer on what two streams make together.

Source: OverLoCK, Lou & Yu, CVPR 2025, arXiv:2502.20087, section 3.2 and figure 4; code: LMMMEng/OverLoCK at commit
2c8ab3b, where scales stand on the residual (`scale_residual`) and have a bias.
Shapes: B = batch, N = H·W tokens, C = channels of the mixer, U = C + those of the context.
"""

import torch
from timm.layers import DropPath, SqueezeExcite
from torch import Tensor, nn

from kernels.depthwise_conv import depthwise_conv
from models.layers.dilated_reparam import DilatedReparam
from models.layers.gated import Carry, carries, gated, given, handed
from models.layers.norm import TokenBatchNorm
from models.layers.position import ConvPosition
from models.layers.response import ResponseMlp, ResponseNorm, biased_scale
from models.layers.tokens import to_map, to_tokens


def squeeze(dim: int) -> SqueezeExcite:
    """Squeeze-and-excitation with an eighth of the channels, at least 16."""
    return SqueezeExcite(dim, rd_channels=max(16, dim // 8), act_layer=nn.GELU)


class Scaled(nn.Module):
    """What the blocks have in common: the sum of a residual and a branch, one of which is scaled.

    Args:
        drop_path: probability that a sample skips a branch in training.
        scale_residual: the scales are those of the residuals; false: those of the branches.
    """

    def __init__(self, drop_path: float, scale_residual: bool) -> None:
        super().__init__()
        self.drop_path, self.scale_residual = DropPath(drop_path), scale_residual

    def joined(self, x_BNC: Tensor, branch_BNC: Tensor, scale: nn.Module) -> Tensor:
        """s(x) + branch, or x + s(branch)."""
        if self.scale_residual:
            return scale(x_BNC) + self.drop_path(branch_BNC)
        return x_BNC + self.drop_path(scale(branch_BNC))


class ReparamBlock(Scaled):
    """u = x + conv(x); u + mlp(SE(BN(large(norm(u))))), `(x_BNC, grid) -> (x_BNC, {})`.

    Args:
        dim: channels.
        kernel, deploy: see `DilatedReparam`.
        mlp_ratio: hidden over outer channels of the MLP.
        layer_scale: of the scale at first; None for no scale.
        drop_path, scale_residual: see `Scaled`.
    """

    FOLDS = (("large", "large_norm"),)

    def __init__(
        self,
        dim: int,
        kernel: int,
        *,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        scale_residual: bool = True,
        deploy: bool = False,
    ) -> None:
        super().__init__(drop_path, scale_residual)
        self.position, self.norm = ConvPosition(dim), nn.LayerNorm(dim, eps=1e-6)
        self.large, self.large_norm = DilatedReparam(dim, kernel, deploy), nn.BatchNorm2d(dim)
        self.se, self.mlp = squeeze(dim), ResponseMlp(dim, int(dim * mlp_ratio))
        self.scale = biased_scale(dim, layer_scale)

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        x_BNC = self.position(x_BNC, grid)
        y_BCHW = self.se(self.large_norm(self.large(to_map(self.norm(x_BNC), grid))))
        return self.joined(x_BNC, self.mlp(to_tokens(y_BCHW), grid), self.scale), {}


class Fusion(nn.Module):
    """grn(W GELU(BN(conv(u)))): two streams made one, `(u_BNU, grid) -> x_BNC`."""

    FOLDS = (("conv", "norm"),)

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), TokenBatchNorm(width)
        self.act, self.fc, self.grn = nn.GELU(), nn.Linear(width, dim), ResponseNorm(dim)

    def forward(self, u_BNU: Tensor, grid: tuple) -> Tensor:
        y_BNU = depthwise_conv(u_BNU, tuple(grid), self.conv.weight, self.conv.bias)
        return self.grn(self.fc(self.act(self.norm(y_BNU))))


class ContextBlock(Scaled):
    """The dynamic block of the Focus-Net: tokens of two streams side by side, `(u_BNU, grid, overview) -> u_BNU`.

        c ← s_c(c) + s_o(overview) but in the first block,   u ← u + conv(u),   n = norm₁(u),   x = fusion(n)
        u ← s₁(u) + W BN(SiLU(BN(W x)) · SE(mix(x) + BN(large(x)))),   u ← u + conv(u),   u ← s₂(u) + mlp(norm₂(u))

    A mixer with `reads_context` is given n besides, one with `reads_stream` the first C channels of it. A `gate`
    weights what is added ("mixer", "mlp"), or the block's output, see `models.layers.block.Block`. Without a `context`,
    as in the authors' `ContMixBlock`, x is n.

    Args:
        mixer: `(x, grid) -> Mixed`, for the C channels of its site, whose `context` has the channels of c.
        kernel, deploy, mlp_ratio, layer_scale, drop_path, scale_residual: see `ReparamBlock`; the MLP has `mlp_ratio`
            times C hidden channels.
        first: whether c is the overview itself.
    """

    FOLDS = (("large", "large_norm"), ("act_fc", "act_norm"))

    def __init__(
        self,
        mixer: nn.Module,
        kernel: int,
        *,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = 1.0,
        drop_path: float = 0.0,
        scale_residual: bool = True,
        first: bool = False,
        deploy: bool = False,
    ) -> None:
        super().__init__(drop_path, scale_residual)
        dim, context = mixer.site.dim, mixer.site.context
        width = dim + context
        self.attn, self.gate_site = mixer, mixer.site._replace(dim=width)
        self.widths, self.gate, self.gate_at = [dim, context], None, "mixer"
        scales = [biased_scale(context, 1.0) for _ in range(0 if first or not context else 2)]
        self.context_scales = nn.ModuleList(scales)
        self.position, self.norm1 = ConvPosition(width), nn.LayerNorm(width, eps=1e-6)
        self.fusion = Fusion(width, dim) if context else None
        self.large, self.large_norm = DilatedReparam(dim, kernel, deploy), nn.BatchNorm2d(dim)
        self.act_fc, self.act_norm, self.act = nn.Linear(dim, dim, bias=False), TokenBatchNorm(dim), nn.SiLU()
        self.se, self.out_norm, self.out = squeeze(dim), TokenBatchNorm(dim), nn.Linear(dim, width)
        self.mlp_position, self.norm2 = ConvPosition(width), nn.LayerNorm(width, eps=1e-6)
        self.mlp = ResponseMlp(width, int(dim * mlp_ratio), width)
        self.scale1, self.scale2 = biased_scale(width, layer_scale), biased_scale(width, layer_scale)

    @property
    def carries(self) -> bool:
        """Whether it takes and returns what its parts carry from block to block."""
        return carries(self.attn, self.gate)

    def forward(self, u_BNU: Tensor, grid: tuple, overview: Tensor | None = None, carry: Carry | None = None) -> tuple:
        """Tokens and losses; given `carry`, also what is carried on."""
        u_BNU = self.position(self._reminded(u_BNU, overview), grid)
        n_BNU = self.norm1(u_BNU)
        x_BNC = n_BNU if self.fusion is None else self.fusion(n_BNU, grid)
        mixed = self.attn(x_BNC, grid, **self._stream(n_BNU), **given(self.attn, carry))
        near_BCHW = self.large_norm(self.large(to_map(x_BNC, grid))) + to_map(mixed.x, grid)
        o_BNC = self.act(self.act_norm(self.act_fc(x_BNC))) * to_tokens(self.se(near_BCHW))
        kept = mixed.losses, handed(self.attn, mixed, carry)
        o_BNU, *kept = gated(self, "mixer", self.out(self.out_norm(o_BNC)), grid, *kept)
        u_BNU = self.mlp_position(self.joined(u_BNU, o_BNU, self.scale1), grid)
        hidden_BNU, *kept = gated(self, "mlp", self.mlp(self.norm2(u_BNU), grid), grid, *kept)
        u_BNU, losses, on = gated(self, "block", self.joined(u_BNU, hidden_BNU, self.scale2), grid, *kept)
        return (u_BNU, losses) if carry is None else (u_BNU, losses, on)

    def _reminded(self, u_BNU: Tensor, overview: Tensor | None) -> Tensor:
        """The tokens, whose second stream has the overview added."""
        if not self.context_scales:
            return u_BNU
        own, of_overview = self.context_scales
        x_BNC, context = u_BNU.split(self.widths, dim=-1)
        return torch.cat([x_BNC, own(context) + of_overview(overview)], dim=-1)

    def _stream(self, n_BNU: Tensor) -> dict[str, Tensor]:
        if not self.attn.reads_stream:
            return {}
        return {"stream_BNC": n_BNU if self.attn.reads_context else n_BNU[..., : self.widths[0]]}
