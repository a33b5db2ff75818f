"""Names of weights in the files of timm's BoTNets, which are those of its ByobNet with attention in some blocks.

Source: the state dicts of timm 1.0.
"""

from models.checkpoints.names.layout import Axes, Layout, Rules

_RULES = (
    (r"^(stages\.\d+)\.blocks\.(\d+)\.", r"\1.\2."),
    (r"^(stages\..*)\.conv1\.", r"\1.conv1_1x1."),
    (r"^(stages\..*)\.conv2\.", r"\1.conv2_kxk."),
    (r"^(stages\..*)\.conv3\.", r"\1.conv3_1x1."),
    (r"\.attn_norm\.", ".post_attn."),
    (r"\.attn\.", ".self_attn."),
    (r"\.core\.position\.(height|width)$", r".pos_embed.\1_rel"),
    (r"^head\.", "head.fc."),
)


def byobnet(rules: Rules = (), axes: tuple[Axes, ...] = ()) -> Layout:
    """timm's names of a ResNet with mixers; `rules` and `axes` are those of the mixer, behind these."""
    pointwise = Axes(r"\.self_attn\.(qkv|q|kv)\.weight$", "oi11", "oi")
    return Layout("timm", (*_RULES, *rules), axes=(*axes, pointwise))


LAYOUTS = (byobnet(),)


def authors(name: str) -> Layout:
    """The layout in which a model was published: timm's, the only one."""
    return LAYOUTS[0]
