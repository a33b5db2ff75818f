"""The size of a token map.

Shapes: B = batch, N = prefix + H·W tokens in row-major order, C = channels.
"""

from typing import NamedTuple


class Grid(NamedTuple):
    """Size of a token map, and the number of class or register tokens in front of it."""

    height: int
    width: int
    prefix: int = 0

    @property
    def cells(self) -> int:
        """Tokens of the map, prefix excluded."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """All tokens: N = prefix + H·W."""
        return self.prefix + self.cells
