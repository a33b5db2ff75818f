"""Names of weights in the files of lucidrains/perceiver-pytorch.

Source: Perceiver, arXiv:2103.03206; the state dicts of its code at commit 96097c6. Rounds that share their weights are
all in such a file, and must be equal there; ours go into files once, as the second round.
"""

import re

from models.checkpoints.names.layout import Joined, Layout

_PARTS = {"norm1": "0.norm", "norm_source": "0.norm_context", "norm2": "1.norm", "attn": "0.fn", "mlp": "1.fn.net"}
_LAYERS = {"attn.q": "to_q", "attn.qkv": "to_qkv", "attn.kv": "to_kv", "attn.proj": "to_out"}
_LAYERS |= {"mlp.fc1": "0", "mlp.fc2": "2"}


def _part(match: re.Match) -> str:
    """Reading and its MLP are the first two of a round there, the third are its blocks of latents."""
    block, name = int(match[2]), match[3]
    part, layer = name.split(".")[0], _LAYERS.get(name)
    within = f"layers.{match[1]}." + (f"2.{block - 1}." if block else "")
    return within + _PARTS[part] + (f".{layer}." if layer else ".")


_RULES = (
    (r"^stem\.latents$", "latents"),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.(norm\w*|attn\.\w+|mlp\.\w+)\.", _part),
    (r"^head_norm\.", "to_logits.1."),
    (r"^head\.", "to_logits.2."),
)
LAYOUTS = (
    Layout(
        "lucidrains/perceiver-pytorch",
        _RULES,
        joined=(Joined(r"\.to_qkv\.", ((".to_q.", 1), (".to_kv.", 2))),),
        copies=(r"^layers\.(?:[2-9]|[1-9]\d+)\.", "layers.1."),
    ),
)


def authors(name: str) -> Layout:
    """The layout in which the model is published."""
    return LAYOUTS[0]
