"""Names of weights in the files of LeapLabTHU/FLatten-Transformer: PVT, PVT v2, Swin and CSWin with focused
linear attention; its DeiT, which was never released, has the names that the others suggest.

Source: FLatten Transformer, arXiv:2308.00442; the state dicts of its code at commit abdb115.
"""

from models.checkpoints.names import backbones
from models.checkpoints.names.layout import Layout

_BY_BACKBONE = backbones.by_name("LeapLabTHU/FLatten-Transformer")
LAYOUTS = tuple(_BY_BACKBONE.values())


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return _BY_BACKBONE[name.split("_")[1]]
