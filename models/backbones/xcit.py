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

from torch import Tensor, nn

from conf import values
from models.attention import AttentionFactory, Grid, Site, build
from models.backbones.base import Backbone, check_counts, pair
from models.backbones.classifier import classifier, init_weights
from models.backbones.stages import quarters
from models.layers.block import Block, Stage, drop_path_rates
from models.layers.class_attention import ClassBlock, ClassToken
from models.layers.local_patch import LocalPatchInteraction
from models.layers.patch_embed import cells
from models.layers.sinusoid import ProjectedPosition
from models.layers.stem import ConvStem, widths_of

EPS = 1e-6


class XCiT(Backbone):
    """Strided convolutions, a position, `depth` equal blocks, class attention, and a Linear of the class token.

    Args:
        attention: factory of the token mixers.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size.
        num_classes: outputs of the head; 0 for none.
        patch_size: pixels of a token's side, a power of two: as many convolutions as halve it to one.
        dim, depth, num_heads: channels C, blocks, heads.
        class_token: classify from a class token, or from the mean over the map, without class attention.
        class_depth: blocks of class attention.
        tokens_norm: whether their second norm is that of all tokens, or of the class token alone.
        drop_path: of every block.
        mlp_ratio, layer_scale: see `Block`.

    Raises:
        ValueError: a patch size that is no power of two, channels that it does not divide, and what mixers refuse.

    The pyramid (`forward_pyramid`) taps four places at equal distance in the depth, in front of the class attention.
    """

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory],
        image_size: int | Sequence[int],
        num_classes: int,
        *,
        patch_size: int = 16,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        class_depth: int = 2,
        tokens_norm: bool = True,
        drop_path: float = 0.0,
        layer_scale: float | None = 1.0,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        counts = {"patch_size": patch_size, "dim": dim, "depth": depth, "num_heads": num_heads}
        check_counts("XCiT", **counts, class_depth=class_depth)
        for name, flag in (("class_token", class_token), ("tokens_norm", tokens_norm)):
            values.flag("XCiT", name, flag, fix=f"set model.{name}=true or false")
        widths = widths_of("XCiT", patch_size, dim)
        image = pair(image_size)
        grid, given = Grid(*cells(image, patch_size)), {"positioned": True, "image_size": image}
        sites = [Site(dim, num_heads, grid, 0, block, depth, "vit", **given) for block in range(depth)]
        rates = drop_path_rates(drop_path, depth, constant=True)
        shared = {"layer_scale": layer_scale, "norm_eps": EPS}
        blocks = [
            Block(
                dim,
                mixer,
                mlp_ratio=mlp_ratio,
                drop_path=rate,
                mlp_position=LocalPatchInteraction(dim, drop_path=rate, **shared),
                **shared,
            )
            for mixer, rate in zip(build(attention, sites), rates, strict=True)
        ]
        self.stem = PositionedStem([in_channels, *widths])
        self.stages = quarters(blocks)
        self.class_stage = None
        if class_token:
            options = {"mlp_ratio": mlp_ratio, "tokens_norm": tokens_norm, **shared}
            asking = [ClassBlock(dim, num_heads, **options) for _ in range(class_depth)]
            self.class_stage = Stage(asking, ClassToken(dim))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = classifier(dim, num_classes)
        self.channels, self.strides, self.grids = [dim] * 4, [patch_size] * 4, [grid] * 4
        self.apply(init_weights)
        self.stem.position.proj.reset_parameters()  # a convolution in the authors' code

    @property
    def pooled_grid(self) -> Grid:
        """See `Backbone`."""
        return self.grids[-1]._replace(prefix=int(self.class_stage is not None))

    def finished(self, x_BNC: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """The class token and the map behind the class attention, normalised."""
        if self.class_stage is not None:
            x_BNC, grid, _ = self.class_stage(x_BNC, grid)
        return self.norm(x_BNC), grid

    def pool(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """The class token, or the mean over the map without one."""
        return x_BNC[:, 0] if grid.prefix else x_BNC.mean(1)

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
