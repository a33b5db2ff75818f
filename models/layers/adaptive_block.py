"""The residual block and the last layer of DiT: norms whose scale and shift come from a condition.

Source: DiT, Peebles & Xie, ICCV 2023, arXiv:2212.09748, section 3.2 and figure 3 (adaLN-Zero).
Shapes: B = batch, N = tokens, C = channels.
"""

from functools import partial

import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from models.layers.gated import Carry, carries, gated, given, handed


class AdaptiveBlock(nn.Module):
    """x + gate · mix(norm(x) · (1 + scale) + shift), then the same around an MLP.

    Shift, scale and gate of both branches are one linear function of the condition, which starts at zero: at first the
    block changes nothing. `gate` and `gate_at` are those of `models.layers.block.Block`.

    Args:
        dim: channels C.
        mixer: `(x, grid) -> Mixed`; one with `reads_stream` is also given the block's input, as `stream_BNC`.
        mlp_ratio: hidden channels of the MLP over C; its GELU is the approximation by tanh.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.attn = mixer
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))
        self.modulation = nn.Linear(dim, 6 * dim)
        self.reads_stream = mixer.reads_stream
        self.gate, self.gate_at = None, "mixer"

    @property
    def carries(self) -> bool:
        """Whether it takes and returns what its parts carry from block to block."""
        return carries(self.attn, self.gate)

    def forward(self, x_BNC: Tensor, grid: tuple, condition_BC: Tensor, carry: Carry | None = None) -> tuple:
        """Tokens and losses; given `carry`, also what is carried on.

        The condition comes through its SiLU, which is the same for all blocks.
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition_BC)[:, None].chunk(6, dim=-1)
        x, y = x_BNC, modulated_norm(x_BNC, shift_1, scale_1)
        stream = {"stream_BNC": x} if self.reads_stream else {}
        mixed = self.attn(y, grid, **stream, **given(self.attn, carry))
        mixed, *kept = gated(self, "mixer", mixed.x, grid, mixed.losses, handed(self.attn, mixed, carry))
        x = x + gate_1 * mixed
        hidden, *kept = gated(self, "mlp", self.mlp(modulated_norm(x, shift_2, scale_2)), grid, *kept)
        x, losses, on = gated(self, "block", x + gate_2 * hidden, grid, *kept)
        return (x, losses) if carry is None else (x, losses, on)


class AdaptiveHead(nn.Module):
    """norm · (1 + scale) + shift, then Linear to `out` numbers per token; both linear layers start at zero."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.modulation, self.linear = nn.Linear(dim, 2 * dim), nn.Linear(dim, out)

    def forward(self, x_BNC: Tensor, condition_BC: Tensor) -> Tensor:
        shift, scale = self.modulation(condition_BC)[:, None].chunk(2, dim=-1)
        return self.linear(modulated_norm(x_BNC, shift, scale))


def modulated_norm(x_BNC: Tensor, shift_B1C: Tensor, scale_B1C: Tensor) -> Tensor:
    """LayerNorm without weights of its own, then the given scale and shift."""
    return F.layer_norm(x_BNC, x_BNC.shape[-1:], eps=1e-6) * (1 + scale_B1C) + shift_B1C
