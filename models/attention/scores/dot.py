"""The scaled product of queries and keys: what a core has without a choice, so that it can be listed beside others.

Source: Attention Is All You Need, Vaswani et al., 2017, arXiv:1706.03762, equation 1.
Shapes: those of the core.
"""

from models.attention.contract import Site


def dot(site: Site) -> None:
    """Nothing in the place of the core's own product, which then is on its kernel.

    Args:
        site: the place in the backbone.
    """
