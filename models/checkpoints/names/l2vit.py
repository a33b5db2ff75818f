"""Names of weights in the files of ChuanyangZheng/L2ViT.

Source: The Linear Attention Resurrection in Vision Transformer, arXiv:2501.16182; the state dicts of its code.
"""

from models.checkpoints.names.layout import Layout

_RULES = (
    (r"^stem\.conv\.", "downsample_layers.0.proj.proj."),
    (r"^stem\.norm\.", "downsample_layers.0.norm."),
    (r"^stages\.(\d+)\.downsample\.conv\.", r"downsample_layers.\1.proj."),
    (r"^stages\.(\d+)\.downsample\.norm\.", r"downsample_layers.\1.norm."),
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
    (r"\.position\.proj\.", ".cpe.0.proj."),
    (r"\.mlp_position\.proj\.", ".cpe.1.proj."),
    (r"\.mlp_position\.norm\.", ".norm3."),
    (r"\.mlp_position\.bn\.bn\.", ".local_mp.bn."),
    (r"\.mlp_position\.(conv[12])\.", r".local_mp.\1."),
    (r"\.attn\.core\.temperature$", ".attn.temperature"),
)
LAYOUTS = (Layout("ChuanyangZheng/L2ViT", _RULES),)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
