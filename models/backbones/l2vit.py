"""L2ViT: blocks with attention in windows and blocks with linear attention and large convolutions, in turn.

Source: The Linear Attention Resurrection in Vision Transformer, Zheng, 2025, arXiv:2501.16182, section 3; code:
ChuanyangZheng/L2ViT. Every block has a depth-wise convolution as position encoding in front of its attention; even
blocks have another one in front of the MLP, odd ones a branch of two large convolutions there (LCM). The plan of the
models has window attention in even blocks and `linear` in odd ones. The code's layer scale is never used.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Grid, Site
from models.backbones.hierarchical import Hierarchical
from models.layers.block import Block
from models.layers.downsample import ConvDownsample
from models.layers.local_patch import LocalPatchInteraction
from models.layers.position import ConvPosition
from models.layers.stem import ConvStem

LCM_KERNEL = 7


class L2ViT(Hierarchical):
    """Two convolutions, then stages that halve the map by a LayerNorm and a 2×2 convolution; norm, mean, head."""

    positioned = True
    only_patch_size = 4

    def block(self, site: Site, mixer: nn.Module, rate: float) -> Block:
        options = {"kernel_size": LCM_KERNEL, "drop_path": rate, "norm_eps": self.norm_eps}
        before_mlp = LocalPatchInteraction(site.dim, **options) if site.block % 2 else ConvPosition(site.dim)
        return super().block(site, mixer, rate, position=ConvPosition(site.dim), mlp_position=before_mlp)

    def between(self, s: int) -> ConvDownsample:
        dim, out_dim = self.channels[s - 1 : s + 1]
        return ConvDownsample(dim, out_dim, norm=nn.LayerNorm(dim, eps=self.patch_eps))

    def stem_of(self, in_channels: int) -> "Stem":
        return Stem(in_channels, self.channels[0], self.patch_eps)


class Stem(ConvStem):
    """Two 3×3 convolutions with stride 2 and batch norms, ReLU between them, then LayerNorm; in whole patches of 4."""

    def __init__(self, in_channels: int, dim: int, eps: float) -> None:
        first = nn.Conv2d(in_channels, dim // 2, 3, stride=2, padding=1)
        second = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        super().__init__(first, nn.BatchNorm2d(dim // 2), nn.ReLU(), second, nn.BatchNorm2d(dim))
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        height, width = images.shape[-2:]
        x_BNC, grid = super().forward(F.pad(images, (0, -width % 4, 0, -height % 4)))
        return self.norm(x_BNC), grid
