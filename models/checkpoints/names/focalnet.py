"""Names of weights in the files of microsoft/FocalNet and of timm's FocalNet, with norms before or behind the branches.

Source: Focal Modulation Networks, arXiv:2203.11926; the state dicts of its code at commit e8514bd and of timm 1.0. In
the authors' files what makes the map smaller ends the stage before.
"""

from models.checkpoints.names.layout import Layout, Rules

_MIXER = (
    (r"\.attn\.convs\.(\d+)\.", r".modulation.focal_layers.\1.0."),
    (r"\.attn\.", ".modulation."),
)
_AUTHORS = (
    (r"^stem\.", ""),
    (r"^norms\.(\d+)\.", r"norm\1."),
    (r"^stages\.(\d+)\.downsample\.conv\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.proj."),
    (r"^stages\.(\d+)\.downsample\.out_norm\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.norm."),
    (r"^stages\.", "layers."),
    (r"\.attn\.norm\.", ".modulation.ln."),
    (r"\.scale([12])\.gamma$", r".gamma_\1"),
    *_MIXER,
)
_TIMM = (
    (r"^stem\.patch_embed\.", "stem."),
    (r"^stages\.", "layers."),
    (r"\.downsample\.conv\.", ".downsample.proj."),
    (r"\.downsample\.out_norm\.", ".downsample.norm."),
    (r"\.scale([12])\.gamma$", r".ls\1.gamma"),
    (r"^head\.", "head.fc."),
    *_MIXER,
)
_BEHIND: Rules = ((r"\.norm([12])\.", r".norm\1_post."),)
_POINTWISE = r"^stages\.\d+\.blocks\.\d+\.(attn\.[fh]|attn\.proj|mlp\.fc[12])\.weight$"
LAYOUTS = (
    Layout("microsoft/FocalNet", _AUTHORS, pointwise=r"\.attn\.h\.weight$"),
    Layout("timm", _TIMM, pointwise=_POINTWISE),
    Layout("timm (norms behind)", _TIMM + _BEHIND, pointwise=_POINTWISE),
)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
