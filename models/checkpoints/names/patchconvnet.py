"""Names of weights in the files of facebookresearch/deit for PatchConvNet, with a query for all classes or for each.

Source: Augmenting Convolutional networks with attention-based aggregation, arXiv:2112.13692; the state dicts of its
code at commit 7e160fe. Where there is a query for each class, each has a classifier with one row.
"""

from models.checkpoints.names.layout import Axes, Joined, Layout, Rules

CLASSES = 1000  # of the authors' files
_POOL: Rules = (
    (r"^pooling\.(class_)?queries$", "cls_token"),
    (r"^pooling\.norm\.", "norm."),
    (r"^pooling\.", "blocks_token_only.0."),
)
_RULES: Rules = (
    (r"^stem\.conv\.(\d+)\.", r"patch_embed.proj.\1.0."),
    *_POOL,
    (r"\.scale([12])\.gamma$", r".gamma_\1"),
    (r"^(blocks\.\d+\.attn)\.proj_in\.", r"\1.qkv_pos.0."),
    (r"^(blocks\.\d+\.attn)\.conv\.", r"\1.qkv_pos.2."),
    (r"^(blocks\.\d+\.attn)\.se\.fc1\.", r"\1.qkv_pos.4.conv_reduce."),
    (r"^(blocks\.\d+\.attn)\.se\.fc2\.", r"\1.qkv_pos.4.conv_expand."),
    (r"^(blocks\.\d+\.attn)\.proj\.", r"\1.qkv_pos.5."),
)
_SHARED = {"pointwise": r"^stages\.\d+\.blocks\.\d+\.attn\.proj(_in)?\.weight$", "numbered": True}
_SQUEEZE = Axes(r"\.qkv_pos\.4\.\w+\.weight$", "oihw", "oihw")  # which are convolutions here too
_QUERIES = Axes(r"^cls_token$", "1kc", "kc")
_ROWS = Joined(r"^head\.", tuple((f"head.{row}.", 1) for row in range(CLASSES)))
LAYOUTS = (
    Layout("facebookresearch/deit", _RULES, axes=(_SQUEEZE,), **_SHARED),
    Layout(
        "facebookresearch/deit (a query for each class)", _RULES, joined=(_ROWS,), axes=(_SQUEEZE, _QUERIES), **_SHARED
    ),
)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[int(name.endswith("_multi"))]
