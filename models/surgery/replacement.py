"""One of our mechanisms in the place of the attention of a timm model, with the weights that fit.

A parameter whose role and shape agree stays the same object under the same name: checkpoints, optimizers and what is
frozen go on as before. How the models of timm are taken apart is in `models.surgery.timm_models`.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from conf import names
from conf.errors import UserError
from models.attention import AttentionFactory, Refused, Site, build, check, options_of
from models.attention import make as made
from models.attention.multihead import MultiHead
from models.attention.softmax import SoftmaxCore
from models.factory import compose_model, factory, is_part, merged
from models.surgery.timm_models import Origin, Place, call, origin, places, put

# the same parameter under timm's name and ours
ROLES = {"relative_position_bias_table": "core.bias.table", "q_norm.": "core.q_norm.", "k_norm.": "core.k_norm."}


@dataclass(frozen=True)
class Replacement:
    """What was replaced; `str` says it in a few lines.

    Attributes:
        attention: the mechanism.
        places: names of the modules that it took, as for `model.get_submodule`.
        total: how many such places the model has.
        reused, new, dropped: by the name of a parameter, its numbers in all places together.
        unchanged: whether the new places compute what the old ones did, as random tokens show; always False for a
            model on the meta device.
    """

    attention: str
    places: tuple[str, ...]
    total: int
    reused: dict[str, int]
    new: dict[str, int]
    dropped: dict[str, int]
    unchanged: bool

    def __str__(self) -> str:
        where = self.places[0] if len(self.places) == 1 else f"{self.places[0]} to {self.places[-1]}"
        lines = [f"{self.attention} in {len(self.places)} of {self.total} places: {where}"]
        groups = {"reused": self.reused, "new": self.new, "dropped": self.dropped}
        for what, counts in groups.items():
            others = [name for group in groups.values() if group is not counts for name in group]
            listed = f"{sum(counts.values()):,} parameters: {_listed(counts, others)}" if counts else "nothing"
            lines.append(f"  {what:8} {listed}")
        end = "the output is unchanged" if self.unchanged else "the model computes something else: train it before use"
        return "\n".join([*lines, f"  {end}"])


def _listed(names: Iterable[str], others: Sequence[str]) -> str:
    """Names with commas; of a layer that is in no other group, its name alone."""
    owners = {name: name.rpartition(".")[0] for name in names}
    whole = {owner for owner in owners.values() if owner.count(".") or owner in ("qkv", "proj")}
    whole = {owner for owner in whole if not any(other.startswith(f"{owner}.") for other in others)}
    return ", ".join(dict.fromkeys(owner if owner in whole else name for name, owner in owners.items()))


def replace(
    model: nn.Module,
    attention: str | AttentionFactory | Sequence[AttentionFactory],
    *,
    where: Callable[[Site], bool] | None = None,
    **options: Any,
) -> Replacement:
    """Puts a mechanism into a timm ViT, DeiT or Swin, in place: `replace(model, "agent", agent_tokens=49)`.

    Weights that fit are kept, the same parameters under the same names; the rest starts anew. In a Swin the mechanism
    gets the whole map of the stage; windows are then an option of the mechanism. Make the optimizer after this; timm's
    leave position biases undecayed by their name, and ours have another, `core.bias.table`.

    Args:
        model: of timm, with or without pretrained weights; may have been given to `replace` before.
        attention: a file of conf/attention, see `models.list_attentions()`; or a factory, or a list with one per stage.
        where: which places, e.g. `lambda site: site.block < 4` or `lambda site: site.stage < 2`; None for all.
        options: keys of conf/attention/<attention>.yaml with other values, and parts by the name of their group, e.g.
            `weights="sigmoid"`. Biases, width of the heads and norms of queries and keys are as in the model unless
            given.

    Returns:
        A report to print: places, parameters kept, new and dropped, and whether the output is unchanged.

    Raises:
        ValueError: an unknown name or option, no place, a model of another kind, or a misfit; the model is as before.
    """
    found = places(model)
    name, factories = _factories(attention, options, stages=1 + max(place.site.stage for place in found))
    chosen = _chosen(found, where)
    follows = {}

    def fitted(site: Site) -> nn.Module:
        place, make = chosen[site], factories[site.stage]
        follows[site] = origin(model, place)
        given = options if isinstance(attention, str) else getattr(make, "keywords", {})
        return _mixer(place, make, follows[site], given)

    mixers = build(fitted, list(chosen))
    counts = Counter(), Counter(), Counter()
    for place, mixer in zip(chosen.values(), mixers, strict=True):
        for count, of_place in zip(counts, _share(place.attention, mixer), strict=True):
            count.update(of_place)
    unchanged = all(map(_same_output, chosen.values(), mixers))  # up to the first that differs
    for place, mixer in zip(chosen.values(), mixers, strict=True):  # errors are behind us
        put(model, place, mixer, follows[place.site])
    return Replacement(name, tuple(place.name for place in chosen.values()), len(found), *map(dict, counts), unchanged)


def _factories(attention: Any, options: Mapping[str, Any], stages: int) -> tuple[str, list[AttentionFactory]]:
    """What the mechanism is called, and the factory of each stage."""
    if isinstance(attention, str):
        name, made = attention, _by_name(attention, options)
    elif options:
        raise UserError(
            f"replace: options must go with a name, got {', '.join(options)} with a factory; use functools.partial"
        )
    else:
        name, made = getattr(getattr(attention, "func", attention), "__name__", "a mechanism per stage"), attention
    made = list(made) if isinstance(made, Sequence) else [made] * stages
    if not all(map(callable, made)) or len(made) != stages:
        raise UserError(
            f"replace: attention must be a name, a factory or a list with one for each of {stages} stages, "
            f"got {attention!r}; `python train.py list attentions` shows the names"
        )
    return name, made


def _by_name(name: str, options: Mapping[str, Any]) -> AttentionFactory | Sequence[AttentionFactory]:
    known = names.options("attention")
    if name not in known:
        raise UserError(
            f"replace: there is no attention {name!r}{names.nearest(name, known)}\navailable: {', '.join(known)}"
        )
    parts = {key: value for key, value in options.items() if key in names.PARTS and is_part(key, value)}
    cfg = compose_model("vit_32px", name, parts)
    known = sorted(key for key in cfg.attention if isinstance(key, str) and not key.startswith("_"))
    for key, value in options.items():
        if key in parts:
            continue
        if key not in known:
            listed = ", ".join(known) or "none"
            raise UserError(f"replace: {name} has no option {key!r}{names.nearest(key, known)}; options: {listed}")
        cfg.attention[key] = merged(f"replace: {name}", key, cfg.attention[key], value)
    return factory(cfg)


def _chosen(found: Sequence[Place], where: Callable[[Site], bool] | None) -> dict[Site, Place]:
    if where is not None and not callable(where):
        raise UserError(
            f"replace: where must be a function of a models.attention.Site, got {where!r}; "
            "e.g. where=lambda site: site.block < 4, or None for all places"
        )
    chosen = {place.site: place for place in found if where is None or where(place.site)}
    if not chosen:
        depths = {place.site.stage: place.site.depth for place in found}
        extent = ", ".join(f"stage {stage} with blocks 0 to {depth - 1}" for stage, depth in depths.items())
        raise UserError(f"replace: where must choose a place, got none; the model has {extent}")
    return chosen


def _mixer(place: Place, make: AttentionFactory, follow: Origin, given: Mapping[str, Any]) -> nn.Module:
    """The new mixer, on the device and in the dtype of the old attention.

    Raises:
        Refused: it cannot stand here, or would lose what the attention has.
    """
    site, known = place.site, options_of(make)
    if follow.head_dim * site.num_heads != site.dim and "head_dim" not in known:
        raise Refused(
            f"its heads have {follow.head_dim} channels, here they would have {site.dim // site.num_heads}",
            "choose a mechanism with head_dim, e.g. softmax or window",
        )
    follows = {k: v for k, v in follow._asdict().items() if k in known and k not in given}
    mixer = made(partial(make, **follows), site)
    check(mixer, site._replace(grid=site.grid._replace(prefix=0)))
    if site.grid.prefix and mixer.accepts.prefix == "refused":
        raise Refused(
            f"it works on the map alone and cannot take the {site.grid.prefix} class or register token(s)",
            'create the model with class_token=False, global_pool="avg", or choose another mechanism',
        )
    if mixer.reads_stream:
        raise Refused(
            "it also reads the tokens before their norm, which the blocks of timm do not hand on",
            "use models.create_model, or residual_input=normed",
        )
    if mixer.carries:
        raise Refused("it hands tensors on from block to block, which those of timm do not", "use models.create_model")
    if losses := _losses(mixer, site):
        raise Refused(
            f"it gives the loss {', '.join(losses)} in training, which a timm model does not hand on",
            "use models.create_model, or for moh balance='bias' (see models.attention.moh.balance_heads)",
        )
    mixer.apply(_initialise)
    weight = next(place.attention.parameters())
    mixer.to(weight.device, weight.dtype).train(place.attention.training)
    if follow.qk_norm and not _keep_norms(place.attention, mixer):
        raise Refused("the model normalises queries and keys (qk_norm), which it cannot keep", "use softmax")
    return mixer


@torch.no_grad()
def _losses(mixer: nn.Module, site: Site) -> list[str]:
    """The auxiliary losses of a training step, found out on the meta device, where nothing is computed."""
    state = {name: t.to("meta") for name, t in [*mixer.named_parameters(), *mixer.named_buffers()]}
    x_BNC = torch.empty(2, site.grid.tokens, site.dim, device="meta")
    return sorted(functional_call(mixer, state, (x_BNC, site.grid)).losses)


def _initialise(module: nn.Module) -> None:
    """Linear layers that are new start as in our own models."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _keep_norms(attention: nn.Module, mixer: nn.Module) -> bool:
    """Whether the norms of queries and keys could be taken over, as they are."""
    core = mixer.core if isinstance(mixer, MultiHead) else None
    if not isinstance(core, SoftmaxCore) or isinstance(core.q_norm, nn.Identity):
        return False
    old = attention.core if isinstance(attention, MultiHead) else attention  # timm's
    core.q_norm, core.k_norm = old.q_norm, old.k_norm
    return True


def _share(attention: nn.Module, mixer: nn.Module) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """The mixer takes the parameters whose role and shape agree; numbers reused, new and dropped.

    A bias goes with its weight: that of a depth-wise convolution called `proj` is not that of a projection.
    """
    old = {_role(name): (name, parameter) for name, parameter in attention.named_parameters()}
    reused, new = {}, {}
    for name, parameter in list(mixer.named_parameters()):
        role, (owner, _, leaf) = _role(name), name.rpartition(".")
        _, taken = old.get(role, (name, None))
        alone = leaf == "bias" and f"{role.removesuffix('bias')}weight" not in reused
        if taken is None or taken.shape != parameter.shape or alone:
            new[role] = parameter.numel()
        else:
            setattr(mixer.get_submodule(owner), leaf, taken)
            reused[role] = taken.numel()
    return reused, new, {name: parameter.numel() for role, (name, parameter) in old.items() if role not in reused}


def _role(name: str) -> str:
    """The name of a parameter in its attention, in our words, without what is wrapped around the mixer."""
    while name.startswith("mixer."):
        name = name.removeprefix("mixer.")
    theirs = next((prefix for prefix in ROLES if name.startswith(prefix)), "")
    return ROLES.get(theirs, "") + name.removeprefix(theirs)


@torch.no_grad()
def _same_output(place: Place, mixer: nn.Module) -> bool:
    """Whether old and new agree on random tokens of the model's map, in float32."""
    if any(parameter.is_meta for parameter in mixer.parameters()):
        return False
    block = copy.deepcopy(place.block).eval().to("cpu", torch.float32)
    new = copy.deepcopy(mixer).eval().to("cpu", torch.float32)
    x_BNC = torch.randn(1, place.site.grid.tokens, place.site.dim, generator=torch.Generator().manual_seed(0))
    before = call(place._replace(block=block, attention=block.attn), x_BNC)
    return torch.allclose(new(x_BNC, place.site.grid).x, before, rtol=0, atol=1e-5 * before.abs().max().item())
