"""NAT: stages behind two strided convolutions, or behind patches (DiNAT_s), or one stage alone (isotropic).

Source: Neighborhood Attention Transformer, Hassani et al., CVPR 2023, arXiv:2204.07143, section 3.3; DiNAT, DiNAT_s and
the isotropic sizes: Dilated Neighborhood Attention Transformer, Hassani and Shi, 2022, arXiv:2209.15001, section 3.3;
code: SHI-Labs/Neighborhood-Attention-Transformer at commit d334f5b. The attention is `neighborhood`; ViT-rpb is the
isotropic form with softmax attention and the bias `rpb` over the whole map, which the code ties to one image size.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from typing import Any

from torch import Tensor, nn

from conf import values
from models.attention import Grid
from models.backbones.hierarchical import Hierarchical
from models.layers.downsample import ConvDownsample, PatchMerging
from models.layers.stem import ConvStem


class NAT(Hierarchical):
    """Tokens, then stages that double the channels and halve the map; norm, mean, head. Positions are the attention's.

    Args:
        overlap: tokens are made, and between stages joined, by 3×3 convolutions with stride 2. False: patches, joined
            as in Swin.
        args, options: see `Hierarchical`.
    """

    undecayed = ("position.table", "class_token")  # tables of biases decay: the authors' list of them is never read

    def __init__(self, *args: Any, overlap: bool = True, **options: Any) -> None:
        values.flag("NAT", "overlap", overlap, fix="set model.overlap=true or false")
        self.overlap, self.only_patch_size = overlap, 4 if overlap else None
        super().__init__(*args, **options)

    def between(self, s: int) -> nn.Module:
        dim, out_dim = self.channels[s - 1 : s + 1]
        if not self.overlap:
            return PatchMerging(dim, out_dim)
        norm = nn.LayerNorm(out_dim, eps=self.patch_eps)
        return ConvDownsample(dim, out_dim, kernel_size=3, bias=False, out_norm=norm)

    def stem_of(self, in_channels: int) -> nn.Module:
        return Tokenizer(in_channels, self.channels[0], self.patch_eps) if self.overlap else self.patches(in_channels)

    def level_norm(self, dim: int) -> nn.Module:
        """LayerNorm, as in the authors' detection and segmentation backbones."""
        return nn.LayerNorm(dim, eps=self.norm_eps)


class Tokenizer(ConvStem):
    """Two 3×3 convolutions with stride 2 and nothing between them, then LayerNorm."""

    def __init__(self, in_channels: int, dim: int, eps: float) -> None:
        first = nn.Conv2d(in_channels, dim // 2, 3, stride=2, padding=1)
        super().__init__(first, nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1))
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        x_BNC, grid = super().forward(images)
        return self.norm(x_BNC), grid
