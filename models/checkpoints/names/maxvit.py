"""Names of weights in timm's files of MaxViT, which are those of the authors' weights: they have published none else.

Source: MaxViT, arXiv:2204.01697; the state dicts of timm 1.0 (`maxvit_*_tf_*`). A block there is three here: an MBConv,
of which the first of a stage stands between the stages, windows, and a grid.
The tables of positions there go by key less query, ours by query less key: both axes are flipped.
"""

import re

from models.checkpoints.names.layout import Axes, Layout

_PARTS = ("conv.", "attn_block.", "attn_grid.")
_BODY = {0: "pre_norm", 1: "conv1_1x1", 2: "norm1", 4: "conv2_kxk", 5: "norm2", 7: "se", 8: "conv3_1x1"}


def _part(match: re.Match) -> str:
    """The block there of a block here, and which part of it."""
    block, part = divmod(int(match[2]) + 1, 3)
    return f"stages.{match[1]}.blocks.{block}.{_PARTS[part]}"


_TIMM = (
    (r"^head\.", "head.fc."),
    (r"^head_norm\.norm\.", "head.norm."),
    (r"^head_norm\.fc\.", "head.pre_logits.fc."),
    (r"^stem\.conv\.0\.", "stem.conv1."),
    (r"^stem\.conv\.1\.", "stem.norm1."),
    (r"^stem\.conv\.3\.", "stem.conv2."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.(?:conv\.)?", _part),
    (r"\.downsample\.conv\.", ".blocks.0.conv."),
    (r"\.body\.(\d)\.", lambda match: f".{_BODY[int(match[1])]}."),
    (r"\.shortcut\.", ".shortcut.expand."),
    (r"\.attn\.core\.bias\.table$", ".attn.rel_pos.relative_position_bias_table"),
)
LAYOUTS = (Layout("timm", _TIMM, axes=(Axes(r"\.relative_position_bias_table$", "mhw", "(hw)m", "hw"),)),)


def authors(name: str) -> Layout:
    """The layout in which the authors' weights are read."""
    return LAYOUTS[0]
