"""Every pool and head of conf/ at the end of a backbone of each kind, every reducer in a ViT: a new YAML is tested."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from conf import names
from conf.errors import UserError
from models import create_model
from models.attention import Grid, Site
from models.backbones.base import Backbone
from models.checkpoints import check_config, convert, settings_of
from models.cost import multiply_adds
from models.factory import compose_model, instantiate
from models.runs.initial import start_from

POOLS, HEADS, REDUCERS = (names.options(group) for group in ("pool", "head", "reducer"))
# a plain ViT with and without class token, stages, convolutions, and both
KINDS: dict[str, dict[str, Any]] = {
    "vit_32px": {},
    "vit_32px with a class token": {"class_token": True},
    "swin_32px": {},
    "convnext_32px": {},
    "coatnet_32px": {},
}
PLACES = [("pool", name) for name in POOLS] + [("head", name) for name in HEADS]


def sample(every: int) -> list:
    """All places in all kinds, one in `every` of each always and the others in the full matrix."""
    pairs = [(*place, kind) for place in PLACES for kind in KINDS if place != ("pool", "class_token") or KINDS[kind]]
    spread = [PLACES.index(pair[:2]) + 2 * list(KINDS).index(pair[2]) for pair in pairs]
    return [
        pytest.param(*pair, marks=[pytest.mark.full] if count % every and pair[:2] != ("pool", "class_token") else [])
        for pair, count in zip(pairs, spread, strict=True)
    ]


@cache
def made(place: str, name: str | None, kind: str) -> Backbone:
    torch.manual_seed(0)
    part = {place: name} if name else {}
    return perturbed(create_model(kind.partition(" ")[0], num_classes=5, **KINDS[kind], **part))


def perturbed(model: nn.Module) -> nn.Module:
    """Weights that start at zero or tiny no longer do, so that every part has a say."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def chosen(group: str, name: str, **options: Any) -> DictConfig:
    """A part as a run stores it, with other options."""
    return OmegaConf.merge(compose_model("vit_32px", parts={group: name})[group], options)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("place", "name", "kind"), sample(every=3))
def test_it_trains(place, name, kind):
    """A gradient for every parameter, from the logits and the losses together."""
    model = copy.deepcopy(made(place, name, kind)).train()
    logits, losses = model(images(2, 3, 32, 32), return_losses=True, labels=torch.tensor([3, 1]))
    assert logits.shape == (2, 5) and all(loss.shape == (1,) for loss in losses.values())
    (logits.square().mean() + sum(loss.sum() for loss in losses.values())).backward()
    lacking = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not lacking


@pytest.mark.parametrize(("place", "name", "kind"), sample(every=3))
def test_images_are_judged_alone_and_at_any_size(place, name, kind):
    model, x = made(place, name, kind).eval(), images(2, 3, 48, 64)
    with torch.no_grad():
        both, pooled = model(x), model.forward_pooled(x)
        torch.testing.assert_close(model(x[1:]), both[1:], rtol=1e-4, atol=1e-5)
        assert torch.equal(model(x), both), "evaluation draws no numbers"
        tokens, grid, _ = model.forward_tokens(x)
    assert multiply_adds(model, (32, 32)) > 1e6
    if pooled.weights is not None:
        assert grid.cells <= pooled.weights.shape[2] <= tokens.shape[1]
        assert (pooled.weights >= 0).all() and (pooled.weights.sum(-1) <= 1 + 1e-4).all()


@pytest.mark.parametrize(("place", "name", "kind"), sample(every=3))
def test_what_is_put_in_is_all_that_changes(place, name, kind):
    """The rest of the state is that of the model without it, names and shapes."""
    ours = {key: value.shape for key, value in made(place, name, kind).state_dict().items()}
    theirs = {key: value.shape for key, value in made("pool", None, kind).state_dict().items()}
    changed = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert all(key.startswith("pooling." if place == "pool" else "head.") for key in changed)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not KINDS[kind]])
def test_a_class_token_is_wanted_where_there_is_none(kind):
    with pytest.raises(UserError, match=r"pool: class_token needs a class token .*; set model.class_token=true"):
        create_model(kind, pool="class_token")


def test_nothing_chosen_is_the_model_as_it_was():
    torch.manual_seed(0)
    plain = create_model("convnext_32px", num_classes=5)
    torch.manual_seed(0)
    mean = create_model("convnext_32px", num_classes=5, pool="mean")
    assert plain.pooling is None and plain.state_dict().keys() == mean.state_dict().keys()
    x = images(2, 3, 32, 32)
    assert torch.equal(plain.eval()(x), mean.eval()(x))
    assert plain.forward_pooled(x).weights is None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("vit")])
@pytest.mark.parametrize("name", REDUCERS)
def test_a_reducer_trains_and_judges_images_alone(name, kind):
    model = copy.deepcopy(made("reducer", name, kind))
    model.train()(images(2, 3, 32, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    x = images(2, 3, 48, 64)
    with torch.no_grad():
        both, kept = model.eval()(x), model.forward_kept(x)
        torch.testing.assert_close(model(x[1:]), both[1:], rtol=1e-4, atol=1e-5)
    assert kept and all(((index >= 0) & (index < 12 * 16)).all() for index in kept)


@pytest.mark.parametrize(("group", "name"), PLACES + [("reducer", name) for name in REDUCERS])
def test_wrong_values_and_unknown_options_are_refused_by_name(group, name):
    node = chosen(group, name)
    place = {"pool": (64, Grid(4, 4, 1), 5), "head": (64, 5), "reducer": (64, Grid(4, 4, 1), 2)}[group]
    made_of = instantiate(node)
    for option in (key for key in node if not key.startswith("_")):
        with pytest.raises(UserError, match=rf"^[A-Za-z]+: {option} must be .*, got 'wrong'; .*{group}\.{option}"):
            made_of(*place, **{option: "wrong"})
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        made_of(*place, foo=1)


def test_queries_and_prototypes_do_not_decay():
    ends = {"attention_aggregation": "queries", "efficient_probing": "queries", "slot": "mu"}
    for pool, end in ends.items():
        assert f"pooling.{end}" in made("pool", pool, "vit_32px").no_weight_decay()
    model = made("head", "tversky", "vit_32px with a class token")
    assert {"head.prototypes", "head.features", "stem.class_token"} <= model.no_weight_decay()


def test_pools_and_heads_go_together():
    """With features of another number, behind a norm that stands behind the pooling, and with a head that is chosen."""
    node = chosen("pool", "efficient_probing", d_out=2, num_queries=16)
    model = create_model("convnext_32px", num_classes=5, pool=node, head="tversky")
    assert model.head_norm.normalized_shape == (128,) and model.head.features.shape == (128, 128)
    assert model(images(2, 3, 32, 32)).shape == (2, 5)
    plain = create_model("vit_32px", num_classes=0, pool=node, head="tversky")
    assert plain(images(2, 3, 32, 32)).shape == (2, 48)


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_for_each_class(kind):
    node = chosen("pool", "attention_aggregation", queries="classes")
    model = create_model(kind.partition(" ")[0], num_classes=5, pool=node, **KINDS[kind])
    logits = model(images(2, 3, 32, 32))
    logits.square().mean().backward()
    assert logits.shape == (2, 5) and all(p.grad is not None for p in model.parameters())
    with pytest.raises(UserError, match=r"head: AttentionAggregation brings a classifier .*; leave head= out, or set"):
        create_model("vit_32px", pool=node, head="linear")


def test_losses_of_the_heads_router_and_of_the_pool_come_together():
    model = create_model("vit_32px", attention="moh", pool="acmil", num_classes=5)
    _, losses = model(images(2, 3, 32, 32), return_losses=True, labels=torch.tensor([0, 1]))
    assert {key: tuple(loss.shape) for key, loss in losses.items()} == {
        "load_balance": (4,),
        "diversity": (1,),
        "branches": (1,),
    }
    assert model(images(2, 3, 32, 32), return_losses=True)[1].keys() == {"load_balance", "diversity"}


@pytest.mark.parametrize(("place", "name"), [("pool", "simpool"), ("head", "tversky")])
def test_a_model_that_generates_has_neither(place, name):
    with pytest.raises(
        UserError, match=rf"{place}: it is part of a model that names the class .*, got DiT, which gener"
    ):
        create_model("moh_dit_s_2", **{place: name})


STORED = [
    ("vit_32px", "softmax", {"pool": "acmil", "head": "tversky", "reducer": "top"}),
    ("convnext_32px", "conv", {"pool": "slot", "head": "linear"}),
]


@pytest.mark.parametrize(("name", "attention", "parts"), STORED)
def test_a_stored_run_builds_again_and_its_weights_start_another(name, attention, parts, tmp_path):
    """The configuration passes as that of a file; for other classes what has rows of classes starts anew."""
    cfg = compose_model(name, parts=parts)
    config = {key: OmegaConf.to_container(cfg[key], resolve=True) for key in ("model", "attention")}
    config["run"] = {"model": name, "attention": attention}
    check_config(config["model"])
    trained = perturbed(instantiate(cfg.model, num_classes=7)).eval()
    state, x = trained.state_dict(), images(2, 3, 32, 32)
    again = instantiate(OmegaConf.create(config["model"]), num_classes=7).eval()
    again.load_state_dict(convert(state, name, num_classes=7, **settings_of(config)))
    assert torch.equal(again(x), trained(x))
    save_file(state, tmp_path / "weights.safetensors")
    other = instantiate(cfg.model, num_classes=4)
    anew = {key for key, value in other.state_dict().items() if value.shape != state[key].shape}
    assert anew and all(key.startswith(("head.", "pooling.branches.")) for key in anew)
    notes = start_from(str(tmp_path / "weights.safetensors"), other, config)
    assert notes[1] == "the head starts anew: 7 classes in the weights, 4 in the data"
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items() if key not in anew)


def grid_free(group: str) -> list[str]:
    """Mixers on a whole map, or gates, that say that the map does not matter to them."""
    return [
        name for name in names.options(group) if "/" not in name and getattr(part_at(group, name), "ignores_grid", 0)
    ]


@cache
def part_at(group: str, name: str) -> nn.Module | None:
    site = Site(32, 4, Grid(4, 6, 1), 0, 1, 2, "vit")
    node = compose_model("vit_32px", name).attention if group == "attention" else chosen(group, name)
    try:
        return perturbed(instantiate(node)(site)).eval()
    except UserError:  # refused with a class token
        return None


@pytest.mark.parametrize("group", ["attention", "gate"])
def test_what_may_stand_behind_a_reducer(group):
    """Who says that the map does not matter gives the same for another."""
    x, found = images(2, 25, 32), grid_free(group)
    assert {"attention": {"softmax", "moh", "flow", "xca"}, "gate": {"eca", "se"}}[group] <= set(found)
    for name in found:
        part = part_at(group, name)
        torch.testing.assert_close(part(x, Grid(4, 6, 1)).x, part(x, Grid(1, 24, 1)).x, msg=name)
