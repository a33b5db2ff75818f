"""Names of weights in the files of DaiShiResearch/TransNeXt, and of the TransNeXt of SkyworkAI/MoH (MoH-ViT).

Source: TransNeXt, arXiv:2311.17132, and MoH, arXiv:2410.11842; the state dicts of their code at commits c8a9974 and
2cefd57, which hold no tables of positions. Names are those of PVT v2 and of its attention, with queries apart from keys
and values in aggregated attention and all three in one in cosine attention, that of the last stage.
"""

from dataclasses import replace

from models.checkpoints.names import backbones
from models.checkpoints.names.layout import Joined, Layout

_PVT = backbones.pvt("DaiShiResearch/TransNeXt and SkyworkAI/MoH")
_RULES = (
    (r"\.attn\.(router|mixer)\.", ".attn."),
    *_PVT.rules,
    (r"\.attn\.bias\.cpb", ".attn.cpb"),
)
_COSINE_LAST = replace(
    _PVT, rules=_RULES, joined=(Joined(r"^(block[123]\..*)\.qkv\.", ((r"\1.q.", 1), (r"\1.kv.", 2))),)
)
_AGGREGATED_ALL = replace(_PVT, source="DaiShiResearch/TransNeXt (AAAA)", rules=_RULES)  # whose queries are all apart
LAYOUTS = (_COSINE_LAST, _AGGREGATED_ALL)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return _AGGREGATED_ALL if name.endswith("_aaaa") else _COSINE_LAST
