"""iLLaMA: a ViT with the blocks of LLaMA: RMS norms, gated MLPs without biases, and its attention in raster order.

Source: Adapting LLaMA Decoder to Vision Transformer, Wang et al., 2024, arXiv:2404.06773, section 3 and table 1; code:
techmonsterwang/iLLaMA at commit dfc93b9. Its class token stands behind the map there, and here in front of it as
everywhere: `attention=causal` takes it for the last one, so that it sees all others, and files hold its row of the
position table at the end.
Shapes: B = batch, N = prefix + H·W tokens, C = channels.
"""

from typing import Any

from models.backbones.block_keys import set_norm
from models.backbones.vit import ViT
from models.layers.activation import swiglu

MULTIPLE = 256  # of the hidden channels


class ILLaMA(ViT):
    """As `ViT`; an MLP has two thirds of `mlp_ratio` times its channels, rounded up to multiples of 256.

    Args:
        args, dim, mlp_ratio, options: see `ViT`.
    """

    def __init__(self, *args: Any, dim: int, mlp_ratio: float = 4.0, **options: Any) -> None:
        super().__init__(*args, dim=dim, mlp_ratio=mlp_ratio, **options)
        set_norm(self, "rmsnorm")
        for block in (block for stage in self.stages for block in stage.blocks):
            block.mlp = swiglu(dim, int(dim * mlp_ratio), multiple=MULTIPLE, bias=False)
