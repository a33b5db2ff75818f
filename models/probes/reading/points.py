"""Points of a picture on the map of a layer."""

from conf.looking import Point
from models.attention import Grid


def token_at(point: Point | None, grid: Grid) -> int:
    """The number of the token that covers a point."""
    if point is None and grid.prefix:
        return 0
    x, y = (0.5, 0.5) if point is None else point
    row, column = min(int(y * grid.height), grid.height - 1), min(int(x * grid.width), grid.width - 1)
    return grid.prefix + row * grid.width + column
