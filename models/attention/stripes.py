"""Cross-shaped windows: half of the heads attends in vertical stripes of the map, the other half in horizontal ones.

Source: CSWin Transformer, Dong et al., CVPR 2022, arXiv:2107.00652, section 3.2 and equation 7 (locally-enhanced
position encoding, LePE: a depth-wise convolution of the values of each stripe).
Shapes: see `models.attention.cross_shaped`.
"""

from collections.abc import Sequence

from models.attention.assemble import assemble
from models.attention.contract import Mixer, Site
from models.attention.contract.heads import head_channels
from models.attention.contract.options import check_flags
from models.attention.softmax import SoftmaxCore


def cswin_attention(
    site: Site,
    *,
    stripe: int | str | Sequence[int | str] = (1, 2, 7, "all"),
    lepe: bool = True,
    qkv_bias: bool = True,
    backend: str = "auto",
) -> Mixer:
    """Softmax attention in cross-shaped windows, with LePE.

    Args:
        site: the place in the backbone.
        stripe: width of the stripes in tokens, one number or one per stage, cut to the map; "all" for the whole map
            without stripes. Paper: 1, 2, 7, all (12 for 7 at 384 px). A plain ViT takes the third.
        lepe: add a 3×3 depth-wise convolution of the values of each stripe.
        qkv_bias: bias of the projection.
        backend: "auto", "triton" or "torch"; the attention is PyTorch's own fused kernel in any case.
    """
    check_flags("cswin", lepe=lepe, qkv_bias=qkv_bias)
    dim = head_channels(site)
    options = {"qkv_bias": qkv_bias, "backend": backend}
    return assemble(site, lambda heads, *_: SoftmaxCore(heads, dim, lepe=lepe), stripe=stripe, **options)
