"""Names of weights in the files of facebookresearch/convit, which are those of timm's ConViT.

Source: ConViT, arXiv:2103.10697; the state dicts of its code at commit 0a9340a and of timm 1.0. Their layer of
positions has a bias, which the softmax behind it cancels: it is left out here, and written as zeros.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from models.checkpoints.names.layout import Joined, Layout

if TYPE_CHECKING:
    from torch import Tensor


def _biases(ours: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Zeros in the place of the biases that change nothing."""
    theirs = LAYOUTS[0].names(ours)
    weights = {theirs[name][0].name: value for name, value in ours.items() if name.endswith(".core.position.weight")}
    return {name.replace(".weight", ".bias"): value.new_zeros(len(value)) for name, value in weights.items()}


_RULES = (
    (r"^stages\.3\.downsample\.class_token$", "cls_token"),
    (r"^stem\.position\.table$", "pos_embed"),
    (r"^stem\.patch_embed\.", "patch_embed."),
    (r"\.attn\.core\.position\.", ".attn.pos_proj."),
    (r"\.attn\.core\.gate$", ".attn.gating_param"),
)
_APART = Joined(r"(?<=^blocks\.\d\.attn)\.qkv\.", ((".qk.", 2), (".v.", 1)))  # of the first ten blocks
LAYOUTS = (
    Layout(
        "facebookresearch/convit and timm",
        _RULES,
        joined=(_APART,),
        numbered=True,
        constants=r"\.pos_proj\.bias$",
        make_constants=_biases,
    ),
)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
