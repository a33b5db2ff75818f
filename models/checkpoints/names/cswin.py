"""Names of weights in the files of microsoft/CSWin-Transformer.

Source: CSWin Transformer, arXiv:2107.00652; the state dicts of its code.
"""

from models.checkpoints.names import backbones
from models.checkpoints.names.layout import Layout

LAYOUTS = (backbones.cswin("microsoft/CSWin-Transformer"),)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
