"""Plain weights in the place of reparametrised ones, for who knows nothing of the parametrisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from conf.errors import UserError
from models import create_model
from models.checkpoints.fitting import classes_of

if TYPE_CHECKING:  # a command line that only prints its help does not wait for torch
    from torch import Tensor


def folded(state_dict: Mapping[str, Tensor], name: str, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a model whose settings have a `reparam` or an `adapter`, as they are without.

    Args:
        state_dict: under our names.
        name, settings: the model, see `models.create_model`.

    Raises:
        ValueError: they are not those of the model.
    """
    from models.reparam import fold

    model = create_model(name, num_classes=classes_of(state_dict) or 0, **settings)
    if wrong := sorted(model.state_dict().keys() ^ state_dict.keys()):
        raise UserError(
            f"fold: the weights must be those of {name} with its reparam and adapter, got others: {wrong[0]}"
        )
    model.load_state_dict(state_dict)
    fold(model)
    return model.state_dict()
