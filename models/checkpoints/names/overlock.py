"""Names of weights in the files of LMMMEng/OverLoCK.

Source: OverLoCK, arXiv:2502.20087; the state dicts of its code at commit 2c8ab3b. Products are 1×1 convolutions there;
the two passes over the last two of its four stages are `blocks` and `sub_blocks`, all counted from 1.
"""

from models.checkpoints.names.layout import Axes, Layout


def _next(template: str, by: int = 1) -> object:
    """Replacement with the number of a stage."""
    return lambda match: template.format(int(match[1]) + by)


_REPARAM = (  # of blocks without a mixer, behind their number
    (r"\.large\.large\.", ".proj.1.lk_origin."),
    (r"\.large\.norm\.", ".proj.1.origin_bn."),
    (r"\.large\.branches\.(k\d+_\d+)\.0\.", r".proj.1.dil_conv_\2."),
    (r"\.large\.branches\.(k\d+_\d+)\.1\.", r".proj.1.dil_bn_\2."),
    (r"\.position\.proj\.", ".dwconv."),
    (r"\.norm\.", ".proj.0."),
    (r"\.large_norm\.", ".proj.2."),
    (r"\.se\.fc1\.", ".proj.3.proj.1."),
    (r"\.se\.fc2\.", ".proj.3.proj.3."),
    (r"\.mlp\.fc1\.", ".proj.4."),
    (r"\.mlp\.conv\.proj\.", ".proj.6."),
    (r"\.mlp\.grn\.", ".proj.7."),
    (r"\.mlp\.fc2\.", ".proj.8."),
    (r"\.scale\.", ".ls."),
)
_CONTEXT = (  # of blocks with one
    (r"\.context_scales\.0\.", ".x_scale."),
    (r"\.context_scales\.1\.", ".h_scale."),
    (r"\.position\.proj\.", ".dwconv1."),
    (r"\.fusion\.conv\.", ".fusion.0."),
    (r"\.fusion\.norm\.bn\.", ".fusion.1."),
    (r"\.fusion\.fc\.", ".fusion.3."),
    (r"\.fusion\.grn\.", ".fusion.4."),
    (r"\.attn\.biases\.0\.table$", ".rpb1"),
    (r"\.attn\.biases\.1\.table$", ".rpb2"),
    (r"\.attn\.q\.", ".weight_query.0."),
    (r"\.attn\.q_norm\.bn\.", ".weight_query.1."),
    (r"\.attn\.k\.", ".weight_key.1."),
    (r"\.attn\.k_norm\.bn\.", ".weight_key.2."),
    (r"\.attn\.v\.", ".weight_value.0."),
    (r"\.attn\.v_norm\.bn\.", ".weight_value.1."),
    (r"\.attn\.weigh\.", ".weight_proj."),
    (r"\.attn\.proj\.", ".dyconv_proj.0."),
    (r"\.attn\.proj_norm\.bn\.", ".dyconv_proj.1."),
    (r"\.large\.large\.", ".lepe.0.lk_origin."),
    (r"\.large\.norm\.", ".lepe.0.origin_bn."),
    (r"\.large\.branches\.(k\d+_\d+)\.0\.", r".lepe.0.dil_conv_\2."),
    (r"\.large\.branches\.(k\d+_\d+)\.1\.", r".lepe.0.dil_bn_\2."),
    (r"\.large_norm\.", ".lepe.1."),
    (r"\.se\.fc1\.", ".se_layer.proj.1."),
    (r"\.se\.fc2\.", ".se_layer.proj.3."),
    (r"\.act_fc\.", ".gate.0."),
    (r"\.act_norm\.bn\.", ".gate.1."),
    (r"\.out_norm\.bn\.", ".proj.0."),
    (r"\.out\.", ".proj.1."),
    (r"\.mlp_position\.proj\.", ".dwconv2."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.conv\.proj\.", ".mlp.2."),
    (r"\.mlp\.grn\.", ".mlp.3."),
    (r"\.mlp\.fc2\.", ".mlp.4."),
    (r"\.scale([12])\.", r".ls\2."),
)


_RULES = (
    (r"^stem\.conv\.", "patch_embed1."),
    (r"^stages\.(\d+)\.(?:base\.)?downsample\.conv\.", _next("patch_embed{}.0.")),
    (r"^stages\.(\d+)\.(?:base\.)?downsample\.out_norm\.bn\.", _next("patch_embed{}.1.")),
    (r"^stages\.(\d+)\.overview\.downsample\.conv\.", _next("patch_embed{}.0.", 2)),
    (r"^stages\.(\d+)\.overview\.downsample\.out_norm\.bn\.", _next("patch_embed{}.1.", 2)),
    (r"^stages\.\d+\.downsample\.main\.", "patch_embedx.x_proj."),
    (r"^stages\.\d+\.downsample\.context\.", "patch_embedx.h_proj."),
    (r"^(patch_embedx\..)_proj\.conv\.", r"\1_proj.0."),
    (r"^(patch_embedx\..)_proj\.out_norm\.bn\.", r"\1_proj.1."),
    (r"^stages\.\d+\.context\.", "high_level_proj."),
    (r"^stages\.([01])\.blocks\.", _next("blocks{}.")),
    (r"^stages\.(\d+)\.base\.blocks\.", _next("blocks{}.")),
    (r"^stages\.(\d+)\.overview\.blocks\.", _next("blocks{}.", 2)),
    (r"^stages\.(\d+)\.blocks\.", _next("sub_blocks{}.")),
    (r"^norm\.fc\.", "head.0."),
    (r"^norm\.norm\.bn\.", "head.1."),
    (r"^head\.(weight|bias)$", r"head.4.\1"),
    (r"^aux_norm\.bn\.", "aux_head.0."),
    (r"^aux_head\.(weight|bias)$", r"aux_head.2.\1"),
    *((rf"^(blocks\d\.\d+){ours}", rf"\1{theirs}") for ours, theirs in _REPARAM),
    *((rf"^(sub_blocks\d\.\d+){ours}", rf"\1{theirs}") for ours, theirs in _CONTEXT),
)
_PRODUCTS = r"\.mlp\.fc[12]|\.fusion\.fc|\.attn\.(?:q|k|v|weigh|proj)|\.act_fc|\.out|^stages\.\d+\.context|^norm\.fc"
_AS_THERE = r"\.(?:proj\.3|se_layer)\.proj\.[13]\.weight$|\.(?:[xh]_scale|ls[12]?)\.weight$|\.(?:gamma|beta)$"
LAYOUTS = (
    Layout(
        "LMMMEng/OverLoCK",
        _RULES,
        pointwise=rf"(?:{_PRODUCTS}|^(?:aux_)?head)\.weight$",
        axes=(Axes(_AS_THERE, "oihw", "oihw"),),  # what is a map of one cell here too
    ),
)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
