"""CSWin Transformer: four stages with convolutions between them; cross-shaped windows or any other injected mixing.

Source: CSWin Transformer, Dong et al., CVPR 2022, arXiv:2107.00652, section 3.1 and table 1. The windows are the
attention `cswin`. As in the authors' code the first convolution has 7×7 pixels with stride 4 and 2 zeros around the
image, and norms stand behind the convolutions.
"""

from models.backbones.hierarchical import Hierarchical
from models.layers.downsample import ConvDownsample, overlapping
from models.layers.stem import PatchStem


class CSWin(Hierarchical):
    """A 7×7 convolution with stride 4, stages with a strided 3×3 convolution between them, norm, mean, head."""

    only_patch_size = 4
    order = ("stages", "stem")

    def between(self, s: int) -> ConvDownsample:
        return overlapping(*self.channels[s - 1 : s + 1])

    def stem_of(self, in_channels: int) -> PatchStem:
        return self.patches(in_channels, kernel_size=7, padding=2)
