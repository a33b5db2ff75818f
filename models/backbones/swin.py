"""Swin Transformer: four stages with patch merging between them; windows or any other injected token mixing.

Source: Swin Transformer, Liu et al., ICCV 2021, arXiv:2103.14030, sections 3.1 and 3.3.
"""

from models.backbones.hierarchical import Hierarchical
from models.layers.downsample import PatchMerging


class Swin(Hierarchical):
    """Patches, then stages that double the channels and halve the map; norm, mean, head."""

    def between(self, s: int) -> PatchMerging:
        return PatchMerging(*self.channels[s - 1 : s + 1])
