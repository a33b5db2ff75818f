"""Names of weights in the files of LeapLabTHU/Agent-Attention: DeiT, PVT, Swin and CSWin with agents.

Source: Agent Attention, arXiv:2312.08874; the state dicts of its code at commit 207ce3e.
"""

from models.checkpoints.names import backbones
from models.checkpoints.names.layout import Layout

_BY_BACKBONE = backbones.by_name("LeapLabTHU/Agent-Attention", dwc="get_v")
LAYOUTS = tuple(_BY_BACKBONE.values())


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return _BY_BACKBONE[name.split("_")[1]]
