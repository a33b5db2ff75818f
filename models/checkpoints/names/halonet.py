"""Names of weights in the files of timm's HaloNets.

Source: the state dicts of timm 1.0. Queries are apart there, and the rows of keys and values take turns, head by head.
"""

from dataclasses import replace

from models.checkpoints.names.botnet import byobnet
from models.checkpoints.names.layout import Joined, Layout, Turns

_RULES = ((r"^stages\.\d+\.\d+\.last\.", "final_conv."),)
_POSITION = (r"\.qkv\.(weight|bias)$", ".core.position.height")
LAYOUTS = (
    replace(
        byobnet(_RULES),
        joined=(Joined(r"\.qkv\.", ((".q.", 1), (".kv.", 2))),),
        turns=(Turns(r"\.self_attn\.kv\.", 2, _POSITION),),
    ),
)


def authors(name: str) -> Layout:
    """The layout in which a model was published: timm's, the only one."""
    return LAYOUTS[0]
