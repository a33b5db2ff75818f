"""Names of weights in the files of dingmyu/davit, its detection and segmentation backbones, and of timm's davit.

Source: DaViT, arXiv:2204.03645; the state dicts of its code at commit fc79470 and of timm 1.0. A pair of blocks there
is two blocks here.
"""

import re
from collections.abc import Callable

from models.checkpoints.names.layout import Layout


def _pair(template: str) -> tuple[str, Callable[[re.Match], str]]:
    """Rule for the number of a block: 2j is the window block of pair j, 2j + 1 its channel block."""
    return r"^stages\.(\d+)\.blocks\.(\d+)\.", lambda m: template.format(m[1], int(m[2]) // 2, int(m[2]) % 2)


_AUTHORS = (
    (r"^stem\.patch_embed\.", "patch_embeds.0."),
    (r"^stages\.(\d+)\.downsample\.norm\.", r"patch_embeds.\1.norm."),
    (r"^stages\.(\d+)\.downsample\.conv\.", r"patch_embeds.\1.proj."),
    _pair("main_blocks.{}.{}.{}."),
    (r"\.position\.proj\.", ".cpe.0.proj."),
    (r"\.mlp_position\.proj\.", ".cpe.1.proj."),
    (r"^norms\.(\d+)\.", r"norm\1."),
    (r"^head_norm\.", "norms."),
)
_TIMM = (
    (r"^stem\.patch_embed\.proj\.", "stem.conv."),
    (r"^stem\.patch_embed\.norm\.", "stem.norm."),
    _pair("stages.{}.blocks.{}.{}."),
    (r"\.position\.proj\.", ".cpe1.proj."),
    (r"\.mlp_position\.proj\.", ".cpe2.proj."),
    (r"^head\.", "head.fc."),
    (r"^head_norm\.", "head.norm."),
)
LAYOUTS = (Layout("dingmyu/davit", _AUTHORS), Layout("timm", _TIMM))


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
