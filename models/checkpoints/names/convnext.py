"""Names of weights in the files of facebookresearch/ConvNeXt, its detection and segmentation backbones, and of timm's.

Source: A ConvNet for the 2020s, arXiv:2201.03545; the state dicts of its code and of timm 1.0.
"""

from models.checkpoints.names.layout import Layout

_AUTHORS = (
    (r"^stem\.patch_embed\.proj\.", "downsample_layers.0.0."),
    (r"^stem\.patch_embed\.norm\.", "downsample_layers.0.1."),
    (r"^stages\.(\d+)\.downsample\.norm\.", r"downsample_layers.\1.0."),
    (r"^stages\.(\d+)\.downsample\.conv\.", r"downsample_layers.\1.1."),
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
    (r"\.attn\.proj\.", ".dwconv."),
    (r"\.mlp\.fc([12])\.", r".pwconv\1."),
    (r"\.scale\.gamma$", ".gamma"),
    (r"^norms\.(\d+)\.", r"norm\1."),
    (r"^head_norm\.", "norm."),
)
_TIMM = (
    (r"^stem\.patch_embed\.proj\.", "stem.0."),
    (r"^stem\.patch_embed\.norm\.", "stem.1."),
    (r"\.downsample\.norm\.", ".downsample.0."),
    (r"\.downsample\.conv\.", ".downsample.1."),
    (r"\.attn\.proj\.", ".conv_dw."),
    (r"\.scale\.gamma$", ".gamma"),
    (r"^head\.", "head.fc."),
    (r"^head_norm\.", "head.norm."),
)
LAYOUTS = (Layout("facebookresearch/ConvNeXt", _AUTHORS), Layout("timm", _TIMM))


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
