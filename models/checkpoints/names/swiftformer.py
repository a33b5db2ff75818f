"""Names of weights in the files of Amshaker/SwiftFormer and of timm's SwiftFormer.

Source: SwiftFormer, arXiv:2303.15446; the state dicts of its code at commit 4aa6cd6 and of timm 1.0.
"""

from models.checkpoints.names.layout import Axes, Layout, Rules

_SHARED: Rules = (
    (r"^norm\.bn\.", "norm."),
    (r"\.downsample\.conv\.", ".downsample.proj."),
    (r"\.downsample\.out_norm\.bn\.", ".downsample.norm."),
    (r"\.attn\.query\.", ".attn.to_query."),
    (r"\.attn\.key\.", ".attn.to_key."),
    (r"\.attn\.weight$", ".attn.w_g"),
    (r"\.attn\.out\.", ".attn.final."),
    (r"\.norm2\.bn\.", ".linear.norm1."),
    (r"\.position\.", ".local_representation."),
    (r"(\.local_representation|\.conv)\.proj\.", r"\1.dwconv."),
    (r"(\.local_representation|\.conv)\.norm\.bn\.", r"\1.norm."),
    (r"(\.local_representation|\.conv)\.mlp\.fc([12])\.", r"\1.pwconv\2."),
    (r"\.mlp\.", ".linear."),
    (r"(\.blocks\.\d+)\.conv\.", r"\1."),
)
_AUTHORS: Rules = (
    (r"\.scale$", ".layer_scale"),
    (r"\.scale([12])\.gamma$", r".layer_scale_\1"),
    (r"\.attn\.proj\.", ".attn.Proj."),
    (r"^stem\.conv\.", "patch_embed."),
    (r"^distill_head\.", "dist_head."),
    (r"^stages\.(\d+)\.downsample\.", lambda m: f"network.{2 * int(m[1]) - 1}."),
    (r"^stages\.(\d+)\.blocks\.", lambda m: f"network.{2 * int(m[1])}."),
)
_TIMM: Rules = (
    (r"\.scale$", ".layer_scale.gamma"),
    (r"\.scale([12])\.gamma$", r".layer_scale_\1.gamma"),
    (r"^stem\.conv\.", "stem."),
    (r"^distill_head\.", "head_dist."),
)
_SCALES = (Axes(r"\.layer_scale(_[12])?(\.gamma)?$", "c11", "c"),)
_POINTWISE = r"\.mlp\.fc[12]\.weight$"
LAYOUTS = (
    Layout("Amshaker/SwiftFormer", _SHARED + _AUTHORS, pointwise=_POINTWISE, axes=_SCALES),
    Layout("timm", _SHARED + _TIMM, pointwise=_POINTWISE, axes=_SCALES),
)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
