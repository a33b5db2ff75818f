"""XCiT: a convolutional stem, blocks of attention among channels and of patches among neighbours, class attention.

Source: XCiT: Cross-Covariance Image Transformers, El-Nouby et al., NeurIPS 2021, arXiv:2106.09681, sections 3.2 to 3.4;
code: facebookresearch/xcit at commit 82f5291. A block is
    x + γ₁ mix(norm₁(x)),   x + γ₃ local(norm₃(x)),   x + γ₂ mlp(norm₂(x))
The class token joins behind the last of these (`models.layers.class_attention`). As in the code drop path is the same
in all blocks, and there is none in the class attention; its training forward, which returns the logits twice, is left
out. The attention among channels is `xca`.
Shapes: B = batch, N = prefix + H·W tokens, C = channels.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from conf import values
from models.attention import Grid, Site
from models.backbones.base import check_counts
from models.backbones.plain import Plain
from models.layers.block import Block, Stage
from models.layers.class_attention import ClassBlock, ClassToken
from models.layers.local_patch import LocalPatchInteraction
from models.layers.sinusoid import ProjectedPosition
from models.layers.stem import ConvStem, widths_of


class XCiT(Plain):
    """Strided convolutions, a position, `depth` equal blocks, class attention, and a Linear of the class token.

    Args:
        class_token: classify from a class token, or from the mean over the map, without class attention.
        class_depth: blocks of class attention.
        tokens_norm: whether their second norm is that of all tokens, or of the class token alone.
        layer_scale: see `Block`.
        args, options: see `Plain`; `patch_size` is a power of two: as many convolutions as halve it to one.

    Raises:
        ValueError: a patch size that is no power of two, channels that it does not divide, and what mixers refuse.

    The pyramid (`forward_pyramid`) taps places in front of the class attention.
    """

    positioned = constant_drop_path = True

    def __init__(
        self,
        *args: Any,
        class_token: bool = True,
        class_depth: int = 2,
        tokens_norm: bool = True,
        layer_scale: float | None = 1.0,
        **options: Any,
    ) -> None:
        check_counts("XCiT", class_depth=class_depth)
        for name, flag in (("class_token", class_token), ("tokens_norm", tokens_norm)):
            values.flag("XCiT", name, flag, fix=f"set model.{name}=true or false")
        self.class_depth, self.tokens_norm = class_depth if class_token else 0, tokens_norm
        super().__init__(*args, layer_scale=layer_scale, **options)
        self.stem.position.proj.reset_parameters()  # a convolution in the authors' code

    def check(self, patch_size: int, dim: int) -> None:
        self.widths = widths_of("XCiT", patch_size, dim)

    def stem_of(self, in_channels: int, dim: int, patch_size: int, grid: Grid) -> "PositionedStem":
        return PositionedStem([in_channels, *self.widths])

    def block(self, site: Site, mixer: nn.Module, rate: float) -> Block:
        options = {"drop_path": rate, "layer_scale": self.layer_scale, "norm_eps": self.norm_eps}
        return super().block(site, mixer, rate, mlp_position=LocalPatchInteraction(site.dim, **options))

    def behind_stages(self, dim: int, num_heads: int) -> None:
        """The class attention."""
        self.class_stage = None
        if self.class_depth:
            options = {"mlp_ratio": self.mlp_ratio, "layer_scale": self.layer_scale, "norm_eps": self.norm_eps}
            asking = [
                ClassBlock(dim, num_heads, tokens_norm=self.tokens_norm, **options) for _ in range(self.class_depth)
            ]
            self.class_stage = Stage(asking, ClassToken(dim))

    @property
    def pooled_grid(self) -> Grid:
        """See `Backbone`."""
        return self.grids[-1]._replace(prefix=int(self.class_stage is not None))

    def finished(self, x_BNC: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """The class token and the map behind the class attention, normalised."""
        if self.class_stage is not None:
            x_BNC, grid, _ = self.class_stage(x_BNC, grid)
        return self.norm(x_BNC), grid

    def group_matcher(self, coarse: bool = False) -> dict:
        """As of every backbone, and the blocks of class attention behind the others."""
        groups = super().group_matcher(coarse)
        if coarse:
            return groups
        *blocks, last = groups["blocks"]
        stem = rf"{groups['stem']}|^class_stage\.downsample"
        return {"stem": stem, "blocks": blocks, "class_blocks": [(r"^class_stage\.blocks\.(\d+)", None), last]}


class PositionedStem(ConvStem):
    """Convolutions with stride 2, each with a batch norm and GELU between them; then the position.

    Args:
        widths: channels of the image, and behind each convolution.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [nn.Sequential(conv, nn.BatchNorm2d(after)), nn.GELU()]
        super().__init__(*layers[:-1])
        self.position = ProjectedPosition(widths[-1])

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        x_BNC, grid = super().forward(images)
        return self.position(x_BNC, grid), grid
