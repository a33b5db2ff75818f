"""The class token: the first of the tokens in front of the map.

Source: Dosovitskiy et al., ICLR 2021, arXiv:2010.11929, equation 4.
Shapes: B = batch, N = prefix + H·W tokens, C = channels.
"""

from torch import Tensor

from conf.errors import UserError
from models.layers.grid import Grid
from models.layers.pooled import Pool, Pooled


class ClassToken(Pool):
    """(B, N, C) → (B, C).

    Args:
        dim: channels C.
        grid: of the last stage, with the tokens in front of it.
        num_classes: of the place; it does not depend on it.

    Raises:
        ValueError: there is no class token.
    """

    has_weights = False
    reads_map = False

    def __init__(self, dim: int, grid: Grid, num_classes: int) -> None:
        if not grid.prefix:
            raise UserError(
                "pool: class_token needs a class token in front of the map of the last stage, got none; "
                "set model.class_token=true where the model has that key, or pool=mean"
            )
        super().__init__(dim)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Pooled:
        return Pooled(x_BNC[:, 0], None, {})
