"""Names of weights in the files of SkyworkAI/MoH: its TransNeXt (MoH-ViT) and its DiT.

Source: MoH, arXiv:2410.11842; the state dicts of its code at commit 2cefd57.
"""

from models.checkpoints.names import dit, transnext
from models.checkpoints.names.layout import Layout

_BY_BACKBONE = {"transnext": transnext, "dit": dit}
LAYOUTS = (*transnext.LAYOUTS, *dit.LAYOUTS)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return _BY_BACKBONE[name.split("_")[1]].authors(name)
