"""Mechanisms from parts: short forms are their layouts, parts reach what a wrapper wraps, misfits say what to do."""

from functools import partial

import pytest
import torch

from models import create_model
from models.attention import Grid, Refused, Site, build, make
from models.attention.agent import agent_attention
from models.attention.assemble import assemble
from models.attention.biases.relative import relative
from models.attention.biformer import biformer_attention
from models.attention.layouts.axial import axial
from models.attention.layouts.grid import grid
from models.attention.layouts.reduced import reduced
from models.attention.layouts.stripes import stripes
from models.attention.layouts.window import window
from models.attention.moh import MoHAttention
from models.attention.plan import first_blocks
from models.attention.softmax import SoftmaxCore, softmax_attention

MAP = Grid(6, 8)
SITE = Site(dim=16, num_heads=2, grid=MAP, stage=2, block=1, depth=2, kind="hierarchical")


def same(one, other) -> bool:
    """Whether two mixers have the same weights by name, and give the same with them, to the bit."""
    one.load_state_dict(other.state_dict())
    x = torch.randn(2, MAP.tokens, 16)
    return torch.equal(one(x, MAP).x, other(x, MAP).x)


@pytest.mark.parametrize("mechanism", [softmax_attention, partial(agent_attention, agent_tokens=4)])
@pytest.mark.parametrize(
    ("short", "layout"),
    [
        ({"window": 4}, partial(window, size=4)),
        ({"stripe": 2}, partial(stripes, width=2)),
        ({"sr_ratio": 2}, partial(reduced, ratio=2)),
        ({"kv_pool": 3}, partial(reduced, pool=3)),
    ],
    ids=["window", "stripe", "sr_ratio", "kv_pool"],
)
def test_old_options_are_short_for_layouts(mechanism, short, layout):
    assert same(mechanism(SITE, layout=layout), mechanism(SITE, **short))


def test_shifted_windows_with_a_table_are_those_of_swin():
    ours = softmax_attention(SITE, layout=partial(window, size=4, shift=True, stored_mask=True), bias=relative)
    swin = softmax_attention(SITE, window=4, shift=True, stored_mask=True, relative_position_bias=True)
    assert same(ours, swin) and "shift_mask" in ours.state_dict() and "core.bias.table" in ours.state_dict()


def test_tokens_of_a_dilated_grid_see_each_other():
    """A token of a 6×8 map in groups of 3×4 sees those two rows and two columns away."""
    mixer = softmax_attention(SITE, layout=partial(grid, size=(3, 4)))
    x = torch.randn(1, MAP.tokens, 16, requires_grad=True)
    mixer(x, MAP).x.view(6, 8, 16)[1, 2].sum().backward()
    seen = x.grad.abs().sum(-1).view(6, 8) > 0
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[1::2, ::2] = True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize(("along", "rows", "columns"), [("rows", 1, 8), ("columns", 6, 1)])
def test_tokens_see_their_axis(along, rows, columns):
    mixer = softmax_attention(SITE, layout=partial(axial, along=along))
    for size in (MAP, Grid(5, 3)):
        x = torch.randn(1, size.tokens, 16, requires_grad=True)
        mixer(x, size).x[0, 0].sum().backward()
        seen = (x.grad.abs().sum(-1) > 0).view(size[:2])
        assert seen.sum() == (size.width if along == "rows" else size.height) and seen[0, 0]


def test_both_axes_are_the_sum_of_the_two():
    both, rows, columns = (softmax_attention(SITE, layout=partial(axial, along=a)) for a in ("both", "rows", "columns"))
    x = torch.randn(2, MAP.tokens, 16)
    for one in (rows, columns):
        one.load_state_dict(both.state_dict())
    expected = rows(x, MAP).x + columns(x, MAP).x - both.proj.bias
    torch.testing.assert_close(both(x, MAP).x, expected)


def test_parts_reach_what_is_wrapped():
    moh = partial(MoHAttention, core=softmax_attention, layout=partial(window, size=4), bias=relative)
    plain = partial(MoHAttention, core=partial(softmax_attention, layout=partial(window, size=4), bias=relative))
    assert make(moh, SITE).mixer.window == make(plain, SITE).mixer.window == (4, 4)
    assert make(moh, SITE).state_dict().keys() == make(plain, SITE).state_dict().keys()
    plan = partial(first_blocks, blocks=[0, 0, 1, 0], first=agent_attention, rest=softmax_attention)
    plan = partial(plan, layout=partial(window, size=4))
    assert [make(plan, SITE._replace(block=block)).window for block in (0, 1)] == [(4, 4), (4, 4)]


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        (
            partial(agent_attention, weights=relative),
            "no logits of queries and keys on which attention/weights could work",
        ),
        (partial(agent_attention, bias=relative), "no logits .* attention/bias could work; leave out attention/bias"),
        (
            partial(biformer_attention, layout=window),
            "decides by itself who sees whom, so it takes no layout",
        ),
        (partial(biformer_attention, pre=window), "has no place for attention/pre; leave out attention/pre"),
        (
            partial(softmax_attention, layout=window, window=2),
            "two layouts, attention/layout and a window",
        ),
        (
            partial(agent_attention, window=4, shift=True),
            "AgentCore takes no mask, which Windows needs",
        ),
        (
            partial(softmax_attention, window=2, bias=relative, relative_position_bias=True),
            "two biases.*; set rel",
        ),
    ],
    ids=["weights", "bias", "layout", "pre", "two layouts", "mask", "two biases"],
)
def test_misfits_say_what_to_do(factory, text):
    with pytest.raises(ValueError, match=f"1 of 1 places .*\n  stage 2 block 1 .*{text}"):
        build(factory, [SITE])


def test_a_class_token_stands_in_every_group():
    """It sees all tokens, all see it; what they get with one alone on the map is what a window with it gives."""
    mixer = softmax_attention(SITE._replace(grid=Grid(6, 8, 1)), layout=partial(grid, size=(3, 4)))
    x = torch.randn(1, 49, 16, requires_grad=True)
    out = mixer(x, Grid(6, 8, 1)).x
    (of_class,) = torch.autograd.grad(out[0, 0].sum(), x, retain_graph=True)
    (of_cell,) = torch.autograd.grad(out[0, 1].sum(), x)
    assert (of_class.abs().sum(-1) > 0).all() and of_cell[0, 0].abs().sum() > 0
    assert (of_cell[0, 1:].abs().sum(-1) > 0).sum() == 12
    alone = softmax_attention(SITE._replace(grid=Grid(6, 8, 1)))
    whole = softmax_attention(SITE._replace(grid=Grid(6, 8, 1)), layout=partial(window, size=8))
    whole.load_state_dict(alone.state_dict())
    torch.testing.assert_close(whole(x, Grid(6, 8, 1)).x, alone(x, Grid(6, 8, 1)).x)


def test_shifted_windows_mask_no_class_token():
    chosen = partial(window, size=4, shift=True)
    mixer = softmax_attention(SITE._replace(grid=Grid(6, 8, 1)), layout=chosen, bias=relative)
    assert mixer.attention_matrix(torch.randn(2, 49, 16), Grid(6, 8, 1))[:, :, 0].gt(0).all()


def test_names_that_a_library_user_types():
    parts = {"layout": "grid", "weights": "sigmoid", "bias": "kerple", "transform": "rope"}
    model = create_model("vit_32px", attention="softmax", gate="eca", pool="simpool", class_token=True, **parts)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    lacking = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert lacking == [] and model.pooling is not None


def test_old_windows_and_layouts_with_other_keys_take_no_class_token():
    for chosen in ({"attention": "window"}, {"layout": "halo"}, {"layout": "stripes"}):
        with pytest.raises(ValueError, match=r"cannot take the 1 class token.*; set model.class_token=false"):
            create_model("vit_32px", class_token=True, **chosen)
    create_model("vit_32px", layout="whole", class_token=True)


def test_names_of_parts():
    with pytest.raises(ValueError, match=r"there is no layout 'gird'; did you mean 'grid'\?"):
        create_model("vit_32px", layout="gird")
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        softmax_attention(SITE, foo=1)


def test_weights_that_are_written_out_are_refused_where_they_are_many():
    class Even(torch.nn.Module):
        def forward(self, logits, open):
            return torch.full_like(logits, 1 / logits.shape[-1])

    factory = partial(softmax_attention, weights=lambda site: Even(), max_tokens=48)
    assert "written out for Even" in factory(SITE).runs().reason
    with pytest.raises(Refused, match=r"of 49 x 49 pairs, 0 MiB per image and head, more than max_tokens=48"):
        factory(SITE._replace(grid=Grid(7, 7)))
    with pytest.raises(Refused, match=r"choose attention/layout=window, or raise attention.max_tokens"):
        factory(SITE)(torch.randn(1, 49, 16), Grid(7, 7))
    windowed = partial(factory, layout=partial(window, size=4))
    assert windowed(SITE._replace(grid=Grid(70, 70)))(torch.randn(1, 4900, 16), Grid(70, 70)).x.shape == (1, 4900, 16)


def test_a_core_has_the_map_that_it_sees():
    seen = []

    def core(num_heads, grid, kv_grid):
        seen.append((num_heads, grid, kv_grid))
        return SoftmaxCore(num_heads, 8)

    assemble(SITE, core, sr_ratio=2)
    assemble(SITE, core, stripe=2)
    assert seen == [(2, MAP, Grid(3, 4)), (1, Grid(6, 2), Grid(6, 2)), (1, Grid(2, 8), Grid(2, 8))]
