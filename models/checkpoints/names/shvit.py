"""Names of weights in the files of ysj9909/SHViT and of timm's SHViT.

Source: SHViT, arXiv:2401.16456; the state dicts of its code at commit 6a729cc and of timm 1.0. In the authors' files
the first three blocks of a stage after the first are what stands in front of it here.
"""

import re

from models.checkpoints.names.layout import Axes, Layout, Rules


def _stem(m: re.Match) -> str:
    """Convolution, norm and ReLU in turn here; each two of the first in one module there."""
    place, layer = divmod(int(m[1]), 3)
    return f"patch_embed.{2 * place}.{('c', 'bn')[layer]}."


_LAYERS: Rules = (
    (r"^stem\.conv\.(\d+)\.", _stem),
    (r"^head\.", "head.l."),
    (r"^head_norm\.bn\.", "head.bn."),
    (r"\.merge\.fc1\.", ".merge.conv1.c."),
    (r"\.merge\.norm1\.bn\.", ".merge.conv1.bn."),
    (r"\.merge\.conv\.", ".merge.conv2.c."),
    (r"\.merge\.norm2\.", ".merge.conv2.bn."),
    (r"\.merge\.fc2\.", ".merge.conv3.c."),
    (r"\.merge\.norm3\.bn\.", ".merge.conv3.bn."),
    (r"\.(mlp|mlp_in|mlp_out)\.fc([12])\.", r".\1.m.pw\2.c."),
    (r"\.(mlp|mlp_in|mlp_out)\.norm([12])\.bn\.", r".\1.m.pw\2.bn."),
    (r"\.(position|conv_in|conv_out)\.proj\.", r".\1.m.c."),
    (r"\.(position|conv_in|conv_out)\.norm\.bn\.", r".\1.m.bn."),
    (r"\.position\.", ".conv."),
    (r"\.mlp\.", ".ffn."),
    (r"\.attn\.norm\.", ".mixer.m.pre_norm."),
    (r"\.attn\.qkv\.", ".mixer.m.qkv.c."),
    (r"\.attn\.qkv_norm\.bn\.", ".mixer.m.qkv.bn."),
    (r"\.attn\.proj\.", ".mixer.m.proj.1.c."),
    (r"\.attn\.proj_norm\.bn\.", ".mixer.m.proj.1.bn."),
)
_ENTRY = (("conv_in", "0", "0.0"), ("mlp_in", "1", "0.1"), ("merge", "2", "1"), ("conv_out", "3", "2.0"))
_ENTRY += (("mlp_out", "4", "2.1"),)
_TIMM = tuple((rf"\.downsample\.{ours}\.", f".downsample.{timms}.") for ours, timms, _ in _ENTRY)
_AUTHORS: Rules = (
    *(
        (rf"^stages\.(\d+)\.downsample\.{ours}\.", lambda m, theirs=theirs: f"blocks{int(m[1]) + 1}.{theirs}.")
        for ours, _, theirs in _ENTRY
    ),
    (
        r"^stages\.(\d+)\.blocks\.(\d+)\.",
        lambda m: f"blocks{int(m[1]) + 1}.{int(m[2]) + (3 if int(m[1]) else 0)}.",
    ),
)
_SHAPES = {
    "pointwise": r"\.(fc[12]|qkv|proj)\.weight$",
    "axes": (Axes(r"\.se\.fc[12]\.weight$", "oihw", "oihw"),),  # which are convolutions here too
}
LAYOUTS = (
    Layout("ysj9909/SHViT", _LAYERS + _AUTHORS, **_SHAPES),
    Layout("timm", _LAYERS + _TIMM, **_SHAPES),
)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
