"""Names of weights in the files of BangguWu/ECANet, and of timm's ResNets with ECA in every block."""

from models.checkpoints.names.layout import Layout
from models.checkpoints.names.resnet import resnet

LAYOUTS = (resnet("BangguWu/ECANet", gate="eca"), resnet("timm"))


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
