"""Cross-shaped windows: who sees whom, padding, any core in them, and plans of two mechanisms in a backbone."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import create_model
from models.attention import Grid, Refused, Site, build
from models.attention.agent import agent_attention
from models.attention.cross_shaped import CrossShaped
from models.attention.focused_linear import focused_linear_attention
from models.attention.inline import inline_attention
from models.attention.multihead import MultiHead
from models.attention.plan import first_blocks
from models.attention.softmax import softmax_attention
from models.attention.stripes import cswin_attention

SITE = Site(16, 4, Grid(6, 8), 1, 0, 1, "hierarchical")
CORES = {
    "softmax": cswin_attention,
    "agent": partial(agent_attention, agent_tokens=[2, 2]),
    "focused": focused_linear_attention,
    "inline": inline_attention,
}


def made(factory, site: Site = SITE, **options: object) -> nn.Module:
    torch.manual_seed(0)
    module = factory(site, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double()


def tokens(grid: Grid = SITE.grid, batch: int = 2) -> Tensor:
    return torch.randn(batch, grid.tokens, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_each_direction_is_attention_in_its_stripes_plus_lepe() -> None:
    """Written out stripe by stripe: softmax(q kᵀ / √D) v + convolution of the stripe's values."""
    module, x = made(cswin_attention, stripe=2), tokens()
    q, k, v = (part.view(2, 6, 8, 4, 4) for part in module.qkv(x).chunk(3, -1))
    out = torch.zeros(2, 6, 8, 16, dtype=torch.float64)
    stripes = [(0, slice(None), slice(i, i + 2)) for i in (0, 2, 4, 6)]
    stripes += [(1, slice(i, i + 2), slice(None)) for i in (0, 2, 4)]
    for direction, rows, columns in stripes:
        heads = slice(2 * direction, 2 * direction + 2)
        a, b, c = (t[:, rows, columns, heads].flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        mixed = (a @ b.mT / 2).softmax(-1) @ c
        height, width = out[:, rows, columns].shape[1:3]
        channels = c.transpose(1, 2).flatten(2).mT.unflatten(2, (height, width))
        lepe = module.cores[direction].lepe(channels).flatten(2).mT.unflatten(1, (height, width))
        o = mixed.transpose(1, 2).flatten(2).unflatten(1, (height, width)) + lepe
        out[:, rows, columns, 8 * direction : 8 * direction + 8] = o
    torch.testing.assert_close(module(x, SITE.grid).x, module.proj(out.flatten(1, 2)))


@pytest.mark.parametrize("core", CORES)
def test_a_token_sees_its_cross_alone(core: str) -> None:
    """For mechanisms whose state is that of the stripe; InLine's convolution also sees the mean of all tokens."""
    options = {"residual": False} if core == "inline" else {}
    module, x = made(CORES[core], stripe=2, **options), tokens()
    other = x.clone().view(2, 6, 8, 16)
    other[:, 4, 1] += 1.0
    change = (module(other.flatten(1, 2), SITE.grid).x - module(x, SITE.grid).x).view(2, 6, 8, 16).abs().amax(-1)
    cross = torch.zeros(6, 8, dtype=torch.bool)
    cross[4:6], cross[:, 0:2] = True, True
    assert change[:, cross].gt(1e-9).double().mean() > 0.9 and change[:, ~cross].max() < 1e-12


def test_stripes_as_wide_as_the_map_are_dense_attention() -> None:
    wide = made(cswin_attention, stripe=8, lepe=False)
    dense = made(softmax_attention)
    dense.load_state_dict(wide.state_dict())
    torch.testing.assert_close(wide(tokens(), SITE.grid).x, dense(tokens(), SITE.grid).x)


@pytest.mark.parametrize("core", CORES)
def test_maps_that_do_not_divide_are_completed_with_zeros_behind_the_projection(core: str) -> None:
    module, grid = made(CORES[core], stripe=4), Grid(6, 7)
    x, core = tokens(grid), module.cores[0]
    qkv = F.pad(module.qkv(x).unflatten(1, (6, 7)), (0, 0, 0, 1))  # to two vertical stripes of 6x4
    stripes = qkv.unflatten(-1, (3, 2, 8))[..., 0, :].flatten(3).unflatten(2, (2, 4)).transpose(1, 2).reshape(4, 24, 24)
    given = module._context(core, x[..., :8], grid, (6, 4))
    expected = module._in_pytorch(0)(stripes, Grid(6, 4), 2, **given)
    expected = expected.view(2, 2, 6, 4, 8).transpose(1, 2).reshape(2, 6, 8, 8)[:, :, :7].flatten(1, 2)
    got = {}
    module.proj.register_forward_pre_hook(lambda _, args: got.update(x=args[0]))
    module(x, grid)
    torch.testing.assert_close(got["x"][..., :8], expected)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("grid", [Grid(6, 8), Grid(5, 3), Grid(1, 9), Grid(11, 2)], ids=str)
def test_any_map_and_every_parameter_learns(core: str, grid: Grid) -> None:
    module = made(CORES[core], stripe=3)
    out = module(tokens(grid), grid).x
    out.square().sum().backward()
    assert out.shape == (2, grid.tokens, 16) and out.isfinite().all()
    if grid == SITE.grid:
        assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_one_width_per_stage_and_all_for_the_whole_map() -> None:
    kinds = [type(cswin_attention(SITE._replace(stage=stage))) for stage in range(4)]
    assert kinds == [CrossShaped] * 3 + [MultiHead]
    assert [cswin_attention(SITE._replace(stage=stage)).stripe for stage in range(3)] == [1, 2, 7]
    vit = SITE._replace(stage=0, kind="vit")
    assert cswin_attention(vit).stripe == 7 and agent_attention(vit, stripe=[1, 2, "all", 7]).window is None


def test_gates_weight_the_heads_of_both_directions() -> None:
    module, x = made(cswin_attention, stripe=2), tokens()
    gates = torch.zeros(2, SITE.grid.tokens, 4, dtype=torch.float64)
    gates[..., 3] = 1.0
    only = module(x, SITE.grid, gates).x
    with torch.no_grad():
        module.proj.weight[:, :12] = 0
    torch.testing.assert_close(only, module(x, SITE.grid).x)


@pytest.mark.full  # with the defaults: tests/contract/test_full_graph.py
@pytest.mark.parametrize("core", ["softmax", "agent", "inline", "focused"])
def test_compiles_as_one_graph(core: str) -> None:
    module, x = made(CORES[core], stripe=3).float(), tokens().float()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, SITE.grid).x, module(x, SITE.grid).x)


def test_class_tokens_and_an_odd_number_of_heads_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"stage 0 blocks 0-1 .*cannot take the 1 class token.*set model.class_token=f"
    ):
        create_model("vit_32px", attention="cswin", class_token=True, depth=2)
    with pytest.raises(
        Refused, match=r"stripes in two directions share the heads, and 3 is odd; set attention.stripe="
    ):
        cswin_attention(SITE._replace(dim=12, num_heads=3))


# Plans


def named(name: str, site: Site) -> nn.Module:
    module = softmax_attention(site)
    module.called = name
    return module


def planned(blocks: list, depths: list[int]) -> list[list[str]]:
    plan = partial(first_blocks, blocks=blocks, first=partial(named, "A"), rest=partial(named, "B"))
    sites = [Site(16, 2, Grid(4, 4), s, b, d, "hierarchical") for s, d in enumerate(depths) for b in range(d)]
    mixers = iter(build(plan, sites))
    return ["".join(next(mixers).called for _ in range(depth)) for depth in depths]


def test_the_first_blocks_of_every_stage() -> None:
    assert planned(["all", "all", 2, 0], [2, 1, 4, 2]) == ["AA", "A", "AABB", "BB"]
    assert planned([4], [12]) == ["AAAA" + 8 * "B"]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["all"], r"stage 1 block 0 .*blocks=\['all'\] has no entry for stage 1; give attention.blocks one entry per"),
        ([1, 3], r"blocks=\[1, 3\] asks for 3 of 1 blocks in stage 1; use numbers of blocks up to the depth"),
        ([True, 0], r"asks for True of 2 blocks in stage 0"),
        (2, r"blocks=2 is no list; give attention.blocks one entry per stage, e.g. \[all, all, 2, 0\]"),
        ("all", r"blocks='all' is no list"),
        (["some", 0], r"asks for 'some' of 2 blocks in stage 0"),
    ],
)
def test_plans_that_do_not_fit(blocks: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(blocks, [2, 1])


# Options of every mechanism


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (
            agent_attention,
            {"kernel_size": "abc"},
            "agent_attention: kernel_size must be odd and positive, got 'abc'",
        ),
        (agent_attention, {"kernel_size": True}, "kernel_size must be odd and positive, got True"),
        (
            agent_attention,
            {"bias_size": 2.5},
            "bias_size must be a whole number of at least 1, got 2.5; set att",
        ),
        (agent_attention, {"sr_ratio": 2.5}, "attention: sr_ratio must be a whole number of at least 1, got 2.5; set"),
        (
            agent_attention,
            {"trained_agent_tokens": 8},
            r"agent_attention: trained_agent_tokens must be a square",
        ),
        (focused_linear_attention, {"kv_pool": 0}, "attention: kv_pool must be a whole number of at least 1, got 0"),
        (focused_linear_attention, {"power": "abc"}, "power must be at least 1, got 'abc'; the paper uses 3"),
        (focused_linear_attention, {"power": float("nan")}, "power must be at least 1, got nan"),
        (
            focused_linear_attention,
            {"kernel_size": 4},
            "focused_linear_attention: kernel_size must be odd and posit",
        ),
        (
            softmax_attention,
            {"window": [7]},
            r"window must be a side of at least 1, or two, got \[7\]; give a number of tokens",
        ),
        (softmax_attention, {"window": "all"}, "window must be a side of at least 1, or two, got 'all'; give"),
        (inline_attention, {"window": 2.5}, "window must be a side of at least 1, or two, got 2.5"),
    ],
)
def test_wrong_types_are_named(factory, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factory(SITE, **options)


def test_agents_as_in_the_papers_beside_those_that_were_trained() -> None:
    core = agent_attention(SITE._replace(stage=2), trained_agent_tokens=[9, 16, [2, 2], 49]).core
    assert core.agents == (6, 7) and core.gather_bias.agents == (2, 2)
