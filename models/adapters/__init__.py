"""Few trained parameters beside weights that stay as they are: `adapter(model) -> None`, the last thing done to it.

Everything but the pool and the head is frozen, and what the adapter adds is trained. The weights become plain again by
`models.reparam.fold`. Every checkpoint of a run has what is trained in a small file of its own, `adapter.safetensors`.
"""

from pathlib import Path

import torch
from torch import nn

from conf.errors import UserError


@torch.no_grad()
def load_adapter(model: nn.Module, path: str | Path) -> None:
    """Gives a model with an adapter, and with the weights that the adapter was trained beside, what a file has of it.

    Args:
        model: made with the same adapter, its options included.
        path: an `adapter.safetensors`.

    Raises:
        ValueError: the file is of another adapter or another model; nothing was changed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"load_adapter: no safetensors file can be read, got {path}: {error}; fetch it again"
        ) from error
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wrong = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise UserError(
            f"load_adapter: the file must hold what the adapter of the model trains, got another {wrong[0]} in {path}; "
            "make the model with the same adapter and num_classes"
        )
    for name, parameter in own.items():
        parameter.copy_(state[name])
