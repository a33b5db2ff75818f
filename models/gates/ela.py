"""ELA: rows and columns of the map are weighted by what is found along the other axis.

Source: ELA, Xu and Wan, 2024, arXiv:2403.01123:
    a_h = σ(GN(conv1d(mean over W))),  a_w = σ(GN(conv1d(mean over H))),  x ⊙ a_h ⊙ a_w
with one convolution and one group norm for both axes. There is no code of the authors: formula and sizes are those of
community code. `EfficientLocalAttn` of timm is another module: a convolution and a norm per axis, and a SiLU between
norm and sigmoid.
Prefix tokens pass.
Shapes: B = batch, N = prefix + H·W tokens, T = H·W, C = channels.
"""

from torch import Tensor, nn

from conf import values
from models.attention.contract import Grid, Refused, Site
from models.gates import behind_prefix
from models.layers.gated import Gate, Gated
from models.layers.tokens import to_map, to_tokens

# kernel, groups of the convolution, groups of the norm
SIZES = {"T": (5, "C", 32), "B": (7, "C", 16), "S": (5, "C/8", 16), "L": (7, "C/8", 16)}


class ELA(Gate):
    """Efficient local attention.

    Args:
        site: the place in the backbone.
        size: "T", "B", "S" or "L", the paper's versions, see `SIZES`.
        norm_groups: of the group norm; None for those of the size.
    """

    def __init__(self, site: Site, size: str = "B", norm_groups: int | None = None) -> None:
        super().__init__(site)
        kernel, groups, usual = SIZES[values.choice("ela", "size", size, SIZES, fix="set gate.size")]
        norm_groups = usual if norm_groups is None else norm_groups
        values.whole("ela", "norm_groups", norm_groups, fix="set gate.norm_groups, or null for those of the size")
        if site.dim % norm_groups:
            raise Refused(
                f"ela: {site.dim} channels are no multiple of the {norm_groups} groups of the norm",
                "set gate.norm_groups",
            )
        if groups == "C/8" and site.dim % 8:
            raise Refused(f"ela: size {size} has C / 8 groups, got {site.dim} channels", "set gate.size=B or T")
        groups = site.dim if groups == "C" else site.dim // 8
        self.conv = nn.Conv1d(site.dim, site.dim, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.norm = nn.GroupNorm(norm_groups, site.dim)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Gated:
        x_BCHW = to_map(x_BNC, grid)
        rows_BCH, columns_BCW = self.weights(x_BCHW.mean(3)), self.weights(x_BCHW.mean(2))
        gated = to_tokens(x_BCHW * rows_BCH.unsqueeze(3) * columns_BCW.unsqueeze(2))
        return Gated(behind_prefix(x_BNC, gated, grid), {})

    def weights(self, means_BCL: Tensor) -> Tensor:
        """(B, C, L) in (0, 1), from the means over the other axis."""
        return self.norm(self.conv(means_BCL)).sigmoid()
