"""Names of weights in the files of techmonsterwang/iLLaMA.

Source: Adapting LLaMA Decoder to Vision Transformer, arXiv:2404.06773; the state dicts of its code at commit dfc93b9.
The class token comes last there, and so does its row of the position table.
"""

from models.checkpoints.names.layout import Axes, Layout

_RULES = (
    (r"^stem\.class_token$", "cls_token"),
    (r"^stem\.position\.table$", "pos_embed"),
    (r"^stem\.patch_embed\.", "patch_embed."),
    (r"\.mlp\.fc1_g\.", ".mlp.fc1."),
    (r"\.mlp\.fc1_x\.", ".mlp.fc3."),
)
LAYOUTS = (
    Layout("techmonsterwang/iLLaMA", _RULES, axes=(Axes(r"^pos_embed$", "bnc", "bnc", last="n"),), numbered=True),
)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
