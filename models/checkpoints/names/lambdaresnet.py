"""Names of weights in the files of timm's LambdaResNets.

Source: the state dicts of timm 1.0, where the filters of the positions are those of a three-dimensional convolution.
"""

from models.checkpoints.names.botnet import byobnet
from models.checkpoints.names.layout import Axes, Layout

_RULES = (
    (r"\.self_attn\.norm_(q|v)\.bn\.", r".self_attn.norm_\1."),
    (r"\.self_attn\.position\.conv\.", ".self_attn.conv_lambda."),
)
LAYOUTS = (byobnet(_RULES, axes=(Axes(r"\.conv_lambda\.weight$", "kihw1", "kihw"),)),)


def authors(name: str) -> Layout:
    """The layout in which a model was published: timm's, the only one."""
    return LAYOUTS[0]
