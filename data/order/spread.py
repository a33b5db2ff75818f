"""Places evenly spread over what often comes class by class."""

import numpy as np


def spread_over(total: int, count: int) -> list[int]:
    """So many different numbers below `total`, at most all, evenly spread: the first and the last are among them."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()
