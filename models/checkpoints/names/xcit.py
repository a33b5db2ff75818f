"""Names of weights in the files of facebookresearch/xcit, and of timm's xcit.

Source: XCiT, arXiv:2106.09681; the state dicts of its code at commit 82f5291 and of timm 1.0.
"""

from models.checkpoints.names.layout import Joined, Layout

_RULES = (
    (r"^class_stage\.downsample\.class_token$", "cls_token"),
    (r"^class_stage\.blocks\.", "cls_attn_blocks."),
    (r"^stem\.conv\.", "patch_embed.proj."),
    (r"\.attn\.core\.", ".attn."),
    (r"\.mlp_position\.norm\.", ".norm3."),
    (r"\.mlp_position\.scale\.gamma$", ".gamma3"),
    (r"\.mlp_position\.bn\.bn\.", ".local_mp.bn."),
    (r"\.mlp_position\.", ".local_mp."),
    (r"\.scale([12])\.gamma$", r".gamma\1"),
)
_POSITION = r"^stem\.position\.proj\."
_SHARED = {"pointwise": _POSITION, "numbered": True}
_APART = Joined(r"(?<=^cls_attn_blocks\.\d\.attn)\.qkv\.", ((".q.", 1), (".k.", 1), (".v.", 1)))
LAYOUTS = (
    Layout("facebookresearch/xcit", (*_RULES, (_POSITION, "pos_embeder.token_projection.")), **_SHARED),
    Layout("timm", (*_RULES, (_POSITION, "pos_embed.token_projection.")), joined=(_APART,), **_SHARED),
)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
