"""A model whose attention has no head gates becomes one that has: its modules, or its weights."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from conf.errors import UserError
from models.attention import Mixer, Site, build, mixers_of
from models.attention.moh import MoHAttention, start_undecided
from models.surgery.timm_models import is_of_timm


def to_moh(
    model: nn.Module, shared: Any, routed: Any, *, where: Callable[[Site], bool] | None = None, **options: Any
) -> list[str]:
    """Puts a head gate on every attention of a trained model, in place, to train it on with fewer active heads.

    All weights stay. The new routers begin undecided, every active head with weight 1: with shared + routed = all heads
    the model computes exactly what it did; with fewer, the heads that a token does not choose are missing. Make the
    optimizer after this. A run does the same when `init=` names the weights of a model without gates.

    Args:
        model: of `models.create_model`. For a model of timm use `replace(model, "moh", ...)`.
        shared: heads that are always active: a number, a fraction, or a list, see `models.attention.moh.MoHAttention`.
        routed: heads that each token chooses among the others, likewise.
        where: which places, e.g. `lambda site: site.block < 4`; None for all.
        options: `router`, `balance`, `all_reduce`, `backend` of `MoHAttention`. With balance="bias" a training loop of
            your own calls `models.attention.moh.balance_heads(model)` after every optimizer step.

    Returns:
        The names of the gated modules.

    Raises:
        ValueError: no place, gates that are there already, or heads that do not fit; the model is as before.
    """
    found = dict(mixers_of(model))
    if not found or is_of_timm(model):
        raise UserError(
            f"to_moh: the model must be of models.create_model and have attention, got {type(model).__name__}; "
            'give a model of timm to models.attention.replace(model, "moh")'
        )
    if gated := [name for name, mixer in found.items() if isinstance(mixer, MoHAttention)]:
        raise UserError(f"to_moh: the model must have no head gates, got some in {gated[0]}; give the dense model")
    names = {mixer.site: name for name, mixer in found.items() if where is None or where(mixer.site)}
    if not names:
        raise UserError(f"to_moh: where must choose a place, got none of {len(found)}; see models.attention.Site")

    def gated_mixer(site: Site) -> Mixer:
        mixer = found[names[site]]
        module = MoHAttention(site, core=lambda _: mixer, shared_heads=shared, routed_heads=routed, **options)
        return module.train(mixer.training)

    for module, name in zip(build(gated_mixer, list(names)), names.values(), strict=True):
        start_undecided(module.router)
        weight = next(module.mixer.parameters())
        module.router.to(weight.device)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, module)
    return list(names.values())


def gated_weights(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor] | None:
    """Weights of a model without head gates, for the same one with gates; None where they are not.

    Args:
        state: in our names.
        model: with gates, whose routers are made undecided; what they hold is in the result.
    """
    gated = {name: module for name, module in model.named_modules() if isinstance(module, MoHAttention)}
    if not gated or any(key.startswith(f"{name}.router.") for name in gated for key in state):
        return None
    moved = {}
    for key, value in state.items():
        owner = next((name for name in gated if key.startswith(f"{name}.")), None)
        moved[key if owner is None else f"{owner}.mixer{key.removeprefix(owner)}"] = value
    for name, module in gated.items():
        start_undecided(module.router)
        moved |= {f"{name}.router.{key}": value for key, value in module.router.state_dict().items()}
    return moved
