"""Names of weights in the files of ziplab/LIT, which are those of Swin but between the stages.

Source: LIT, arXiv:2105.14217; the state dicts of its code at commit 742e961.
"""

from dataclasses import replace

from models.checkpoints.names import backbones
from models.checkpoints.names.layout import Layout

_SWIN = backbones.swin("ziplab/LIT")
_BETWEEN = (
    (r"\.downsample\.offset\.", ".downsample.dconv.conv_offset."),
    (r"\.downsample\.conv\.", ".downsample.dconv."),
    (r"\.downsample\.norm\.bn\.", ".downsample.norm_layer."),
)
LAYOUTS = (replace(_SWIN, rules=_BETWEEN + _SWIN.rules, masks=""),)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
