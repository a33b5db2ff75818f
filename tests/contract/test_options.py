"""Every option of every mechanism: unknown ones and wrong values are refused by name before anything is built."""

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from functools import cache, partial

import pytest
from torch import nn

from conf.errors import UserError
from models import list_attentions
from models.attention import Grid, Site, build
from models.factory import compose_model, instantiate

SITE = Site(dim=64, num_heads=8, grid=Grid(8, 8), stage=0, block=0, depth=2, kind="hierarchical")
# what means something: none of that, no attention but a convolution, numbers that are not whole
NONE = ("halo", "overlap", "memory", "decay", "lepe_kernel", "cpe_kernel", "shared_heads", "topk", "basis_threshold")
NONE += ("sample_size", "seed")
BROKEN = ("power", "denominator_min", "scale", "locality", "temperature")
BROKEN += ("tolerance",)
ALLOWED = {*((name, 0) for name in NONE), *((name, 2.5) for name in BROKEN)}


@cache
def mechanism(name: str) -> partial:
    return instantiate(compose_model("vit_32px", name).attention)


def hints(make: Callable) -> dict[str, set]:
    """The plain types of every option."""
    function = make.__init__ if inspect.isclass(make) else make
    found = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters
    options = {name: found[name] for name, option in parameters.items() if option.kind is option.KEYWORD_ONLY}
    for name, option in parameters.items():
        if option.kind is option.VAR_KEYWORD:  # what it shares with others
            options |= typing.get_type_hints(typing.get_args(found[name])[0])
    return {
        name: set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
        for name, hint in options.items()
    }


def wrong_values(name: str) -> Iterator[tuple[str, object]]:
    """Values of each option of a mechanism that its type, or its meaning, rules out."""
    yield from wrong(hints(mechanism(name).func), ALLOWED)


def wrong(options: dict[str, set], allowed: set[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    """Values of options of these types that are wrong unless they are `allowed`."""
    for option, kinds in options.items():
        plain, values = {typing.get_origin(kind) or kind for kind in kinds}, []
        if plain & {int, float}:
            listed = plain - {int, float, str, types.NoneType}
            values = [-3, 0, "x", 2.5, True, *([(-3, -3, -3, -3)] if listed else [])]
        elif bool in plain or (str in plain and option != "backend"):  # see test_backends.py for that one
            values = ["wrong", 2]
        yield from ((option, value) for value in values if (option, value) not in allowed)


@pytest.fixture
def made(monkeypatch):
    """Every module that is made."""
    modules, original = [], nn.Module.__init__

    def noted(self, *args, **kwargs):
        modules.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__init__", noted)
    return modules


@pytest.mark.parametrize("name", list_attentions())
def test_an_unknown_option_is_refused_by_name(name, made):
    make = mechanism(name)
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        make(SITE, foo=1)
    assert not made


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("name", list_attentions())
def test_wrong_values_are_refused_with_the_option(name, stage, made):
    """In every stage, also where the option would not be used there, and before there are parameters."""
    taken = []
    for option, value in wrong_values(name):
        try:
            build(partial(mechanism(name), **{option: value}), [SITE._replace(stage=stage)])
            taken.append(f"{option}={value!r} is taken")
        except UserError as error:
            if not re.match(rf"[A-Za-z_]+: .*\b{option}\b", str(error), re.DOTALL):
                taken.append(f"{option}={value!r} is not named: {error}")
        if any(module._parameters for module in made):
            taken.append(f"{option}={value!r} is found late, when {type(made[-1]).__name__} is made")
        made.clear()
    assert not taken, "\n".join(taken)


def test_a_stage_without_routing_checks_the_options_of_routing():
    with pytest.raises(UserError, match="BiLevelRoutingAttention: num_regions must be a whole number of at least 1"):
        mechanism("biformer")(SITE, topk="all", num_regions=-3)
