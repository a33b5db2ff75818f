"""Every part of a mechanism, in the softmax core: in a ViT, in windows and neighbourhoods, under a mixture of heads.

Layouts have tests of their own.
"""

import inspect
import re
from functools import cache, partial

import pytest
import torch
from omegaconf import OmegaConf

from conf import names
from conf.errors import UserError
from models import cost, create_model
from models.attention import Grid, Mixer, Refused, Site, make
from models.attention.focused_linear import focused_linear_attention
from models.attention.layouts.halo import halo
from models.attention.layouts.neighborhood import neighborhood
from models.attention.moh import MoHAttention
from models.attention.scores.dot import dot
from models.attention.softmax import softmax_attention
from models.attention.weights.softmax import softmax
from models.factory import instantiate
from tests.contract.test_options import hints, wrong

PARTS = [(part, name) for part in names.PARTS if part != "layout" for name in names.options(f"attention/{part}")]
VIT = Site(dim=32, num_heads=4, grid=Grid(4, 6), stage=0, block=1, depth=2, kind="vit")
PLACES = {
    "vit": (VIT, {}),
    "class token": (VIT._replace(grid=Grid(4, 6, 1)), {}),
    "shifted windows": (VIT._replace(kind="hierarchical"), {"window": 4, "shift": True}),
    "moh": (VIT._replace(grid=Grid(4, 6, 1)), {}),
    "halo": (VIT._replace(kind="hierarchical"), {"layout": partial(halo, block=2, halo=1)}),
    "neighborhood": (VIT._replace(kind="hierarchical"), {"layout": partial(neighborhood, kernel=3)}),
}
PLACED = {"shifted windows": "Windows", "halo": "Halo", "neighborhood": "Neighborhood"}  # where each key has its place
DROPS = [("transform", "random_keys")]  # cannot be in shifted windows, or in a core that needs the map of its keys
# values that mean something: all other wrong ones are of a wrong type or out of range
ALLOWED = {
    *(("temperature", value) for value in (-3, 0, 2.5)),
    *(("bias", value) for value in (-3, 0, 2, 2.5)),  # of sigmoid: a number, too
    *((name, 0) for name in ("alpha", "gamma", "eps", "seed", "rho")),
    *((name, value) for name in ("eps", "zeta", "power", "base") for value in (2.5,)),
}
each = pytest.mark.parametrize(("part", "name"), PARTS, ids=[f"{part}={name}" for part, name in PARTS])


@cache
def node(part: str, name: str) -> dict:
    return OmegaConf.load(names.CONF / "attention" / part / f"{name}.yaml")


def factory(part: str, name: str) -> partial:
    return instantiate(node(part, name))


def mixer(part: str, name: str, place: str = "vit") -> Mixer:
    site, options = PLACES[place]
    made = partial(softmax_attention, **{part: factory(part, name)}, **options)
    return make(partial(MoHAttention, core=made) if place == "moh" else made, site)


def tokens(place: str, grid: Grid | None = None) -> tuple[torch.Tensor, Grid]:
    grid = grid or PLACES[place][0].grid
    return torch.randn(2, grid.tokens, 32), grid


@pytest.mark.parametrize("place", PLACES)
@each
def test_it_works_wherever_softmax_attention_does(part, name, place):
    """Every parameter has a gradient, images do not see each other, and another map runs."""
    if place in PLACED and (part, name) in DROPS:
        with pytest.raises(Refused, match=f"RandomKeys drops keys, and {PLACED[place]} needs all of them on their map"):
            mixer(part, name, place)
        return
    made = mixer(part, name, place)
    x, grid = tokens(place)
    mixed = made(x, grid)
    (mixed.x.square().mean() + sum(mixed.losses.values())).backward()
    lacking = [key for key, parameter in made.named_parameters() if parameter.grad is None]
    assert not lacking and all(parameter.grad.isfinite().all() for parameter in made.parameters())
    made.eval()
    torch.testing.assert_close(made(x[:1], grid).x, made(x, grid).x[:1])
    x, other = tokens(place, grid._replace(height=7, width=5))
    assert made(x, other).x.isfinite().all()


@pytest.mark.parametrize("place", [place for place in PLACES if place != "moh"])
@each
def test_the_projection_of_weights_times_values_is_the_output(part, name, place):
    if place in PLACED and (part, name) in DROPS:
        return
    made = mixer(part, name, place).eval()
    x, grid = tokens(place)
    matrix = made.attention_matrix(x, grid)
    torch.testing.assert_close(made.attend(matrix, x, grid), made(x, grid).x, rtol=1e-4, atol=1e-5)
    sums = matrix.sum(-1)
    # a factor is one at the start
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5) or not made.core.row_stochastic


@each
def test_each_says_whether_rows_sum_to_one(part, name):
    made = mixer(part, name)
    torch.nn.init.normal_(made.qkv.weight)
    for key, parameter in made.named_parameters():
        if key.startswith("core.factor"):
            torch.nn.init.normal_(parameter)
    sums = made.attention_matrix(*tokens("vit")).sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-4) == made.core.row_stochastic


@each
def test_it_is_made_and_counted_without_memory(part, name):
    with torch.device("meta"):
        model = create_model("vit_32px", attention="softmax", depth=1, dim=32, **{part: name})
    assert cost.multiply_adds(model, (32, 32)) > 0


@each
def test_bfloat16_autocast(part, name):
    x, grid = tokens("vit")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(part, name)(x, grid).x
    y.float().square().mean().backward()
    assert y.isfinite().all()


@each
def test_on_a_linear_core(part, name):
    """What works on logits is refused in a sentence with the key; what changes tokens or values is not."""
    made = partial(focused_linear_attention, **{part: factory(part, name)})
    if part in ("score", "bias", "weights", "factor"):
        group = f"attention/{part}"
        text = f"the mechanism has no logits of queries and keys on which {group} could work; leave out {group}"
        with pytest.raises(Refused, match=text):
            make(made, VIT)
    elif (part, name) in DROPS:
        with pytest.raises(Refused, match=r"RandomKeys drops keys, and FocusedLinearCore needs all of them"):
            make(made, VIT)
    else:
        assert make(made, VIT)(*tokens("vit")).x.isfinite().all()


@each
def test_its_file_states_its_options(part, name):
    function = factory(part, name).func
    own = {key: p.default for key, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    stated = {key: value for key, value in node(part, name).items() if not key.startswith("_")}
    assert stated == own


@each
def test_unknown_options_and_wrong_values_are_refused_by_name(part, name):
    made = factory(part, name)
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        made(VIT, foo=1)
    taken = []
    for option, value in wrong(hints(made.func), ALLOWED):
        try:
            made(VIT, **{option: value})
            taken.append(f"{option}={value!r} is taken")
        except UserError as error:
            if not re.match(rf"\w+: .*\b{option}\b.*; (set|give) .*", str(error)):
                taken.append(f"{option}={value!r} is not named: {error}")
    assert not taken, "\n".join(taken)


@pytest.mark.parametrize(("part", "function"), [("score", dot), ("weights", softmax)])
def test_what_a_core_has_anyway_can_be_named(part, function):
    """So that a sweep may list it: nothing changes, the kernel included, and no weights are written out."""
    site = VIT._replace(grid=Grid(100, 100))
    named, plain = make(partial(softmax_attention, **{part: function}), site), softmax_attention(site)
    assert named.runs(gated=True) == plain.runs(gated=True) and named.runs(gated=True).fused
    assert named.state_dict().keys() == plain.state_dict().keys()


def test_parts_by_the_names_of_their_groups():
    """With a class token and without."""
    options = {"layout": "grid", "weights": "sigmoid", "bias": "kerple", "transform": "rope", "pre": "ssm2d"}
    for token in (True, False):
        small = {"class_token": token, "depth": 1, "num_classes": 3, "image_size": 64}
        model = create_model("vit_tiny", attention="softmax", **small, **options)
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(ValueError, match=r"there is no weights 'sigmiod'; did you mean 'sigmoid'\?"):
        create_model("vit_32px", attention="softmax", weights="sigmiod")
