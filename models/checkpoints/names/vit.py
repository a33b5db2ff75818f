"""Names of weights in the files of facebookresearch/deit, which are those of timm's ViT and DeiT.

Source: DeiT, arXiv:2012.12877; the state dicts of timm 1.0.
"""

from models.checkpoints.names import backbones
from models.checkpoints.names.layout import Layout

LAYOUTS = (backbones.deit("facebookresearch/deit and timm"),)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
