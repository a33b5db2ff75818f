"""Names of weights in the files of microsoft/Swin-Transformer and of timm's Swin.

Source: Swin Transformer, arXiv:2103.14030; the state dicts of its code and of timm 1.0.
"""

from models.checkpoints.names import backbones
from models.checkpoints.names.layout import Layout

_AUTHORS = backbones.swin("microsoft/Swin-Transformer")
_TIMM = Layout(
    "timm",
    (
        (r"^stem\.patch_embed\.", "patch_embed."),
        (r"^stages\.", "layers."),
        (r"\.attn\.core\.bias\.table$", ".attn.relative_position_bias_table"),
        (r"\.attn\.core\.", ".attn."),
        (r"^head\.", "head.fc."),
    ),
    constants=_AUTHORS.constants,
    masks=_AUTHORS.masks,
)
LAYOUTS = (_AUTHORS, _TIMM)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return _AUTHORS
