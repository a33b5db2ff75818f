"""Names of weights in the files of rayleizhu/BiFormer: classification, STL, its second form (nchw), dense backbones.

Source: BiFormer, arXiv:2303.08810; the state dicts of its code at commit 1697bbb.
"""

from models.checkpoints.names.layout import Layout

_BLOCK = (
    (r"\.bn\.", "."),
    (r"\.position\.proj\.", ".pos_embed."),
    (r"\.scale([12])\.gamma$", r".gamma\1"),
    (r"\.mlp\.fc1\.", ".mlp.0."),
)
# stages with routing; the last one is dense and has other names
_ROUTED = ((r"^(stages\.[0-2]\..*\.attn)\.qkv\.", r"\1.qkv.qkv."), (r"^(stages\.[0-2]\..*\.attn)\.proj\.", r"\1.wo."))
_REWRITTEN = (
    (r"^(stages\.[0-2]\..*\.attn)\.qkv\.", r"\1.qkv_linear."),
    (r"^(stages\.[0-2]\..*\.attn)\.proj\.", r"\1.output_linear."),
)
_BIFORMER = (
    (r"^stem\.conv\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.downsample\.conv\.", r"downsample_layers.\1.0."),
    (r"^stages\.(\d+)\.downsample\.out_norm\.", r"downsample_layers.\1.1."),
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
    (r"^norms\.", "extra_norms."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
    *_BLOCK,
)
_STL = (
    (r"^stem\.patch_embed\.proj\.", "downsample_layers.0.0."),
    (r"^stem\.patch_embed\.norm\.", "downsample_layers.0.1."),
    (r"^stages\.(\d+)\.downsample\.norm\.", r"downsample_layers.\1.0."),
    (r"^stages\.(\d+)\.downsample\.conv\.", r"downsample_layers.\1.1."),
    (r"^norms\.", "extra_norms."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
    *_BLOCK,
)
_OF_SECOND, _OF_FIRST = (
    f"these weights belong to the {form} form of the authors' code, whose last stage is another function: "
    for form in ("second", "first")
)
_NCHW = {
    "pointwise": r"^stages\.\d+\.blocks\..*\.(qkv|proj|fc1|fc2)\.weight$",
    "warning": (
        ("biformer_stl", _OF_SECOND + "biformer_stl_nchw is the model that gives its results"),
        *(
            (name, _OF_SECOND + "attention=biformer_nchw is the setting that gives its results")
            for name in ("biformer_tiny", "biformer_small", "biformer_base")
        ),
    ),
}
_FIRST_FORM = (("biformer_stl_nchw", _OF_FIRST + "biformer_stl is the model that gives its results"),)
LAYOUTS = (
    Layout("rayleizhu/BiFormer", _BIFORMER + _ROUTED),
    Layout("rayleizhu/BiFormer (STL)", _STL + _ROUTED, warning=_FIRST_FORM),
    Layout("rayleizhu/BiFormer (nchw)", _BIFORMER + _REWRITTEN, **_NCHW),
    Layout("rayleizhu/BiFormer (STL, nchw)", _STL + _REWRITTEN, **_NCHW),
)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    stl, nchw = name.startswith("biformer_stl"), name.endswith("_nchw")
    return LAYOUTS[stl + 2 * nchw]
