"""Names of weights in the files of LeapLabTHU/InLine: DeiT, PVT, Swin and CSWin with InLine attention.

Source: Bridging the Divide, arXiv:2412.06590; the state dicts of its code at commit e463a6f.
"""

from models.checkpoints.names import backbones
from models.checkpoints.names.layout import Layout

_BY_BACKBONE = backbones.by_name("LeapLabTHU/InLine")
LAYOUTS = tuple(_BY_BACKBONE.values())


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return _BY_BACKBONE[name.split("_")[1]]
