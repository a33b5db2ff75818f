"""How long loops are whose length is in memory: what lists of routes and of chosen tokens have on average."""

from collections.abc import Callable

from kernels.evidence.steps import Recorded

UNION = 2.0  # regions that are routed to by a tile of several, over those by one: smooth routes, each twice
CHOSEN = 0.75  # tokens that choose a head of MoH: as many as the models' shares


def _routed(n: dict[str, int]) -> float:
    """Keys of the regions that a tile visits, or queries of those that visit it."""
    visited = n["K"] if n.get("G", 1) == 1 else min(n["R"], n["K"] * UNION)
    return visited * n["h"] * n["w"]


def _chosen(n: dict[str, int]) -> float:
    """Tokens that have chosen a head."""
    return CHOSEN * n["N"]


LENGTHS: dict[str, Callable[[dict[str, int]], float]] = {"routed_attention": _routed, "moh_attention": _chosen}


def assumed_length(launch: Recorded) -> Callable[[], float]:
    """Of every loop with such a length; 1 in operations that nothing is said of."""
    length = LENGTHS.get(launch.operation.partition(" ")[0])
    return lambda: length(dict(launch.numbers)) if length else 1.0
