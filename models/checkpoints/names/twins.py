"""Names of weights in the files of Meituan-AutoML/Twins, which are those of timm's twins.

Source: Twins, arXiv:2104.13840; the state dicts of its code at commit c1ff671 and of timm 1.0. Where keys may be of a
shortened map, queries have a weight of their own there: in every second block of Twins-SVT, in all of Twins-PCPVT.
"""

from models.checkpoints.names.layout import Joined, Layout

_RULES = (
    (r"^stem\.patch_embed\.", "patch_embeds.0."),
    (r"^stages\.(\d+)\.downsample\.conv\.", r"patch_embeds.\1.proj."),
    (r"^stages\.(\d+)\.downsample\.out_norm\.", r"patch_embeds.\1.norm."),
    (r"^stages\.(\d+)\.(?:blocks\.1\.)?position\.proj\.", r"pos_block.\1.proj.0."),
    (r"^stages\.(\d+)\.blocks\.", r"blocks.\1."),
    (r"\.attn\.reduce\.conv\.", ".attn.sr."),
    (r"\.attn\.reduce\.norm\.", ".attn.norm."),
)
_SOURCE = "Meituan-AutoML/Twins and timm"
_PARTS = ((".q.", 1), (".kv.", 2))
_SVT = Layout(_SOURCE, _RULES, joined=(Joined(r"(?<=[13579]\.attn)\.qkv\.", _PARTS),))
_PCPVT = Layout(_SOURCE, _RULES, joined=(Joined(r"(?<=\.attn)\.qkv\.", _PARTS),))
LAYOUTS = (_SVT, _PCPVT)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return _PCPVT if "pcpvt" in name else _SVT
