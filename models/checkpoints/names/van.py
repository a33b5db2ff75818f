"""Names of weights in the files of Visual-Attention-Network/VAN-Classification.

Source: Visual Attention Network, arXiv:2202.09741; the state dicts of its code at commit e19779b. In the authors' files
what makes the map smaller is named by the stage that it leads to, counted from 1.
"""

from models.checkpoints.names.layout import Layout

_RULES = (
    (r"^stem\.patch_embed\.", "patch_embed1."),
    (r"^stages\.(\d+)\.downsample\.conv\.", lambda m: f"patch_embed{int(m[1]) + 1}.proj."),
    (r"^stages\.(\d+)\.downsample\.out_norm\.", lambda m: f"patch_embed{int(m[1]) + 1}.norm."),
    (r"^stages\.(\d+)\.norm\.", lambda m: f"norm{int(m[1]) + 1}."),
    (r"^stages\.(\d+)\.blocks\.", lambda m: f"block{int(m[1]) + 1}."),
    (r"\.norm\.bn\.", ".norm."),
    (r"\.norm([12])\.bn\.", r".norm\1."),
    (r"\.scale([12])\.gamma$", r".layer_scale_\1"),
    (r"\.mlp\.conv\.", ".mlp.dwconv.dwconv."),
    (r"\.attn\.proj_in\.", ".attn.proj_1."),
    (r"\.attn\.conv\.", ".attn.spatial_gating_unit.conv0."),
    (r"\.attn\.dilated\.", ".attn.spatial_gating_unit.conv_spatial."),
    (r"\.attn\.mix\.", ".attn.spatial_gating_unit.conv1."),
    (r"\.attn\.proj\.", ".attn.proj_2."),
)
LAYOUTS = (
    Layout(
        "Visual-Attention-Network/VAN-Classification",
        _RULES,
        pointwise=r"^stages\.\d+\.blocks\.\d+\.(attn\.(proj_in|mix|proj)|mlp\.fc[12])\.weight$",
    ),
)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
