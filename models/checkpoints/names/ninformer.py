"""Names of weights in the files of Abdullah-88/NiNformer, as its training script saves them.

Source: NiNformer, arXiv:2403.02411; the state dicts of its code. The two Linears of an MLP are `net.0` and `net.3`.
"""

from models.checkpoints.names.layout import Layout, Rules

_LINEARS = {"1": "0", "2": "3"}
_MLPS = {"attn.token_mlp": "mgu.Mixer.token_mix.2", "attn.channel_mlp": "mgu.Mixer.channel_mix.1", "mlp": "ffn"}
_RULES: Rules = (
    (r"^stem\.patch_embed\.proj\.", "patcher."),
    (r"^head\.", "classifier."),
    *(
        (rf"^(blocks\.\d+)\.{ours}\.fc([12])\.", lambda m, theirs=theirs: f"{m[1]}.{theirs}.net.{_LINEARS[m[2]]}.")
        for ours, theirs in _MLPS.items()
    ),
    (r"\.attn\.(token|channel)_norm\.", r".mgu.Mixer.\1_mix.0."),
    (r"\.attn\.linear\.", ".mgu.proj."),
    (r"\.norm1\.", ".norm."),
    (r"^blocks\.", "model."),
)
LAYOUTS = (Layout("Abdullah-88/NiNformer", _RULES, numbered=True),)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
