"""The whole map: every token sees every token, class tokens included."""

from models.attention.contract import Site
from models.attention.contract.layout import Layout


def whole(site: Site) -> Layout:
    """No groups.

    Args:
        site: the place in the backbone.
    """
    return Layout()
