"""Names of weights in the files of whai362/PVT (PVT and PVT v2) and of timm's PVT v2.

Source: PVT, arXiv:2102.12122, and PVT v2, arXiv:2106.13797; the state dicts of their code and of timm 1.0.
"""

from models.checkpoints.names import backbones
from models.checkpoints.names.layout import Layout

_AUTHORS = backbones.pvt("whai362/PVT")
_TIMM = Layout(
    "timm",
    (
        (r"^stem\.patch_embed\.", "patch_embed."),
        (r"\.downsample\.conv\.", ".downsample.proj."),
        (r"\.downsample\.out_norm\.", ".downsample.norm."),
        (r"\.reduce\.conv\.", ".sr."),
        (r"\.reduce\.norm\.", ".norm."),
        (r"\.mlp\.conv\.", ".mlp.dwconv."),
    ),
    joined=_AUTHORS.joined,
)
LAYOUTS = (_AUTHORS, _TIMM)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return _AUTHORS
