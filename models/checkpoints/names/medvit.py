"""Names of weights in the files of Omid-Nejati/MedViT.

Source: MedViT, arXiv:2302.09462; the state dicts of its code at commit 1abcaf6. Products of blocks are 1×1 convolutions
there, but those of the attention and of the squeeze; blocks are counted through all stages.
"""

import re

from models.checkpoints.names.layout import Axes, Joined, Layout


def _stem(match: re.Match) -> str:
    """Convolution, norm and ReLU in turn here; a module of the three there."""
    place, layer = divmod(int(match[1]), 3)
    return f"stem.{place}.{('conv', 'norm')[layer]}."


_RULES = (
    (r"^stem\.conv\.(\d+)\.", _stem),
    (r"^head\.", "proj_head.0."),
    (r"^blocks\.", "features."),
    (r"\.conv\.conv\.", ".mhca.group_conv3x3."),
    (r"\.conv\.norm\.", ".mhca.norm."),
    (r"\.conv\.proj\.", ".mhca.projection."),
    (r"\.entry\.", ".patch_embed."),
    (r"\.side\.", ".projection."),
    (r"\.attn\.reduce\.", ".attn."),
    (r"\.attn\.", ".e_mhsa."),
    (r"\.mlp\.body\.6\.fc1\.", ".conv.conv.6.fc.0."),
    (r"\.mlp\.body\.6\.fc2\.", ".conv.conv.6.fc.2."),
    (r"\.mlp\.body\.", ".conv.conv."),
    (r"\b(norm[12]?)\.bn\.", r"\1."),
)
LAYOUTS = (
    Layout(
        "Omid-Nejati/MedViT",
        _RULES,
        pointwise=r"\.(entry\.conv|side\.conv|conv\.proj)\.weight$",
        joined=(Joined(r"\.qkv\.", ((".q.", 1), (".k.", 1), (".v.", 1))),),
        axes=(Axes(r"\.conv\.conv\.[07]\.weight$", "oihw", "oihw"),),  # which are convolutions here too
        numbered=True,
    ),
)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
