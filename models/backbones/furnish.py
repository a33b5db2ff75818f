"""What a built backbone is furnished with, where a paper changes another place than the attention.

The keys of `model` that every backbone takes besides its own; a group of conf/ gives the factory of each part.
"""

from typing import Any

from torch import nn

from models.backbones.block_keys import change_blocks
from models.backbones.classifier import put_pool_and_head
from models.backbones.gating import put_gates
from models.backbones.reducing import put_reducers
from models.backbones.wrapping import put_wrapper

PLACES = frozenset(
    {
        "gate", "gate_at", "pool", "head", "reducer", "wrapper", "reparam", "own_reparam", "initializer",
        "adapter", "activation", "norm", "wiring", "downsample",
    }
)  # fmt: skip


def furnish(model: nn.Module, **places: Any) -> None:
    """Puts into a model what is chosen; None leaves it as it is.

    `own_reparam` is what some models have in their row, where no other `reparam` is chosen.
    """
    places["reparam"] = places.get("reparam") or places.get("own_reparam")
    put_pool_and_head(model, places.get("pool"), places.get("head"))
    change_blocks(model, **{key: places.get(key) for key in ("activation", "norm", "wiring", "downsample")})
    put_gates(model, places.get("gate"), places.get("gate_at"))
    put_reducers(model, places.get("reducer"))
    put_wrapper(model, places.get("wrapper"))
    for key in ("initializer", "reparam", "adapter"):  # of the weights of all that stands above
        if (change := places.get(key)) is not None:
            change(model)
