"""ConViT: a ViT whose first blocks attend by content and position, among the patches alone.

Source: ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases, d'Ascoli et al., ICML 2021,
arXiv:2103.10697, section 3 and table 1; code: facebookresearch/convit at commit 0a9340a. The class token joins in front
of the first block that attends by content alone, and has no place in the position table. The attention of both kinds of
blocks is `plan/convit`; how values start is `initializer=gpsa` with `only_gated`.
Shapes: B = batch, N = prefix + H·W tokens, C = channels.
"""

from typing import Any

from conf import values
from conf.errors import UserError
from models.backbones.vit import ViT


class ConViT(ViT):
    """As `ViT`, with a class token from a later block on.

    Args:
        token_before: the block, counted from 0, in front of which the class token joins.
        args, depth, options: see `ViT`.

    Raises:
        ValueError: no such block, or the first one, and what `ViT` refuses.

    The pyramid taps the last of the blocks without class token, two places in front of it, and the last block.
    """

    def __init__(self, *args: Any, depth: int, token_before: int = 10, **options: Any) -> None:
        values.whole("ConViT", "token_before", token_before, fix="set model.token_before to a block behind the first")
        if token_before >= depth:
            raise UserError(
                f"ConViT: token_before must be one of the {depth} blocks, counted from 0, got {token_before}; "
                "set model.token_before"
            )
        self.token_joins = token_before
        super().__init__(*args, depth=depth, **options)
