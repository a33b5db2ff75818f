"""Properties of agent attention: the paper's formula, agents, biases on any map, and what is refused."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from kernels.agent_attention import attend_through, local, pooled
from models.attention import Grid, Refused, Site
from models.attention.agent import AgentBias, AgentCore, agent_attention, agent_grid
from models.attention.multihead import MultiHead
from tests.models.attention.defaults import defaults_of

GRIDS = [Grid(5, 8), Grid(8, 5, 1), Grid(4, 4, 2)]


def mixer(grid: Grid, dim: int = 16, heads: int = 2, **options: object) -> MultiHead:
    torch.manual_seed(0)
    module = agent_attention(Site(dim, heads, grid, 0, 0, 1, "hierarchical"), **{"agent_tokens": 9} | options)
    for name, parameter in module.named_parameters():  # biases large enough for a mistake in them to be seen
        if "_bias." in name:
            torch.nn.init.normal_(parameter)
    return module.double()


def tokens(grid: Grid, dim: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, grid.tokens, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def heads_of(module: MultiHead, x: Tensor, grid: Grid) -> tuple[Tensor, ...]:
    return module._project(x, grid)[:3]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_formula_of_the_paper(grid: Grid) -> None:
    """softmax(Q Aᵀ s + B2) (softmax(A Kᵀ s + B1) V) + DWC(V), written out for one head and image at a time."""
    module, x = mixer(grid, agent_tokens=[2, 3]), tokens(grid)
    core, (q, k, v) = module.core, heads_of(module, x, grid)
    gather, scatter = core.gather_bias(grid, (2, 3)), core.scatter_bias(grid, (2, 3))
    for b in range(2):
        of_heads = []
        for m in range(2):
            agents = [
                q[b, m, grid.prefix :].view(*grid[:2], 8)[_bin(i, 2, grid.height), _bin(j, 3, grid.width)].mean((0, 1))
                for i in range(2)
                for j in range(3)
            ]
            a = torch.stack(agents)
            v_a = torch.softmax(a @ k[b, m].T / 8**0.5 + gather[m], dim=-1) @ v[b, m]
            of_heads.append(torch.softmax(q[b, m] @ a.T / 8**0.5 + scatter[m].T, dim=-1) @ v_a)
        expected = torch.cat(of_heads, dim=-1)
        v_map = v[b, :, grid.prefix :].transpose(0, 1).reshape(*grid[:2], 16).permute(2, 0, 1)
        expected[grid.prefix :] += core.dwc(v_map[None])[0].permute(1, 2, 0).reshape(-1, 16)
        torch.testing.assert_close(module(x, grid).x[b], module.proj(expected), rtol=0, atol=1e-12)


def _bin(index: int, bins: int, size: int) -> slice:
    """The cells of one adaptive pooling bin; neighbours overlap where the bins do not divide the size."""
    return slice(index * size // bins, -(-(index + 1) * size // bins))


def test_bias_is_coarse_table_plus_row_plus_column() -> None:
    bias = AgentBias(2, (1, 3), Grid(5, 8, 1)).double()
    got = bias(Grid(5, 8, 1), (1, 3))
    block = F.interpolate(bias.block, size=(5, 8), mode="bilinear")
    torch.testing.assert_close(got[:, :, 0], bias.prefix[:, :, 0])
    for y in range(5):
        for x in range(8):
            expected = block[:, :, y, x] + bias.row[:, :, y] + bias.column[:, :, x]
            torch.testing.assert_close(got[:, :, 1 + y * 8 + x], expected)


def test_all_tokens_as_agents_is_two_dense_softmaxes() -> None:
    grid = Grid(3, 4)
    module, x = mixer(grid, agent_tokens=[3, 4], bias=False), tokens(grid)
    q, k, _ = heads_of(module, x, grid)
    expected = (q @ q.mT / 8**0.5).softmax(-1) @ (q @ k.mT / 8**0.5).softmax(-1)
    torch.testing.assert_close(module.attention_matrix(x, grid), expected)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"trained_agent_tokens": [2, 5]}])
@pytest.mark.parametrize("grid", GRIDS)
def test_matrix_times_values_plus_convolution_is_forward(grid: Grid, options: dict) -> None:
    module, x = mixer(grid, **options), tokens(grid)
    weights, v = module.attention_matrix(x, grid), heads_of(module, x, grid)[2]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    heads = weights @ v + local(v, grid, grid, module.core.dwc.weight, module.core.dwc.bias)
    torch.testing.assert_close(module(x, grid).x, module.proj(heads.transpose(1, 2).flatten(2)))


def test_matrix_with_shortened_keys() -> None:
    grid = Grid(5, 8)
    module, x = mixer(grid, sr_ratio=2), tokens(grid)
    _, _, v, kv_grid = module._project(x, grid)
    weights = module.attention_matrix(x, grid)
    assert kv_grid == Grid(3, 4) and weights.shape == (2, 2, 40, 12)
    heads = weights @ v + local(v, grid, kv_grid, module.core.dwc.weight, module.core.dwc.bias)
    torch.testing.assert_close(module(x, grid).x, module.proj(heads.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("options", [{}, {"sr_ratio": 2}, {"window": [3, 4]}])
def test_transposed_map_with_transposed_weights_gives_the_transposed_output(options: dict) -> None:
    """Height and width are nowhere taken for each other."""
    grid, mirrored_grid = Grid(6, 8), Grid(8, 6)
    options = {"agent_tokens": [2, 3], "trained_agent_tokens": [3, 2]} | options
    mirrored_options = {key: value[::-1] if isinstance(value, list) else value for key, value in options.items()}
    module, mirrored = mixer(grid, **options), mixer(mirrored_grid, **mirrored_options)
    mirrored.load_state_dict(transposed(module.state_dict(), agents=(3, 2)))
    x = tokens(grid)
    mirrored_x = x.view(2, 6, 8, 16).transpose(1, 2).flatten(1, 2)
    expected = module(x, grid).x.view(2, 6, 8, 16).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(mirrored(mirrored_x, mirrored_grid).x, expected)
    assert not torch.allclose(module(mirrored_x, mirrored_grid).x, expected, atol=1e-3)


def transposed(state: dict[str, Tensor], agents: tuple[int, int]) -> dict[str, Tensor]:
    """The weights of the mirrored module: kernels and coarse tables transposed, rows for columns, agents reordered."""
    order = torch.arange(agents[0] * agents[1]).view(agents).T.flatten()
    swap, result = {"row": "column", "column": "row"}, {}
    for name, value in state.items():
        stem, _, last = name.rpartition(".")
        value = value[:, order] if "_bias." in name else value
        result[f"{stem}.{swap.get(last, last)}"] = value.mT if value.dim() == 4 else value
    return result


def test_class_tokens_are_attended_but_are_no_agents_and_stay_out_of_the_convolution() -> None:
    grid = Grid(4, 6, prefix=2)
    module, x = mixer(grid), tokens(grid)
    q, _, v = heads_of(module, x, grid)
    moved = q.clone()
    moved[:, :, :2] += 1.0
    torch.testing.assert_close(pooled(moved, grid, (3, 3)), pooled(q, grid, (3, 3)))
    convolved = local(v, grid, grid, module.core.dwc.weight, module.core.dwc.bias)
    assert convolved[:, :, :2].eq(0).all() and convolved[:, :, 2:].ne(0).all()
    other = x.clone()
    other[:, 0] += 1.0
    assert (module(other, grid).x - module(x, grid).x)[:, 2:].abs().max() > 1e-4


def test_bias_on_the_map_of_training_is_not_interpolated_and_constants_stay_constant_elsewhere() -> None:
    bias = AgentBias(2, (3, 3), Grid(6, 5)).double()
    for table, value in ((bias.block, 1.0), (bias.row, 2.0), (bias.column, 4.0)):
        torch.nn.init.constant_(table, value)
    for grid, agents in ((Grid(6, 5), (3, 3)), (Grid(11, 3), (3, 3)), (Grid(11, 3), (4, 7))):
        expected = torch.full((2, agents[0] * agents[1], grid.cells), 7.0, dtype=torch.float64)
        torch.testing.assert_close(bias(grid, agents), expected)
    torch.nn.init.normal_(bias.row)
    bias.block.data.zero_(), bias.column.data.zero_()
    exact = bias(Grid(6, 5), (3, 3)).view(2, 9, 6, 5)
    assert exact.equal(bias.row[..., None].expand(-1, -1, -1, 5))


def test_bias_keeps_agents_where_they_are_when_their_grid_grows() -> None:
    """A table that grows with the row of the agent does so on a finer grid of agents too."""
    bias = AgentBias(1, (2, 3), Grid(2, 2)).double()
    for table in bias.parameters():
        torch.nn.init.zeros_(table)
    bias.row.data[:] = torch.tensor([0.0, 0, 0, 1, 1, 1]).view(1, 6, 1)
    by_agent = bias(Grid(2, 2), (4, 3))[0, :, 0].view(4, 3)
    assert by_agent.diff(dim=0).ge(0).all() and by_agent[3].sub(by_agent[0]).gt(0.9).all()
    assert by_agent.diff(dim=1).eq(0).all()


@pytest.mark.parametrize("options", [{}, {"sr_ratio": 2}, {"window": 4}, {"agent_tokens": [2, 5]}])
def test_runs_on_other_maps_than_it_is_built_for(options: dict) -> None:
    module = mixer(Grid(6, 6), **options)
    for grid in (Grid(9, 4), Grid(2, 13), Grid(1, 1)):
        x = module(tokens(grid), grid).x
        assert x.shape == (2, grid.tokens, 16) and x.isfinite().all()


@pytest.mark.parametrize(
    ("asked", "grid", "stage", "options", "agents"),
    [
        ("auto", Grid(4, 9), 2, {}, (4, 7)),
        ("auto", Grid(14, 14), 0, {}, (3, 3)),
        ("auto", Grid(14, 14), 1, {"window": [3, 14]}, (3, 4)),
        ("auto", Grid(7, 7), 4, {}, (7, 7)),
        ("auto", Grid(1, 1), 3, {}, (1, 1)),
        ([3, 5], Grid(8, 8), 1, {}, (3, 5)),
        ([9, 16, 49, 49], Grid(8, 8), 1, {}, (4, 4)),
        ([9, [2, 5], 49, 49], Grid(8, 8), 1, {}, (2, 5)),
    ],
)
def test_agents_of_a_stage(asked: object, grid: Grid, stage: int, options: dict, agents: tuple) -> None:
    module = agent_attention(Site(16, 2, grid, stage, 0, 1, "hierarchical"), agent_tokens=asked, **options).double()
    assert module.core.agents == agents and module.core.gather_bias.agents == agents
    assert module(tokens(grid), grid).x.shape == (2, grid.tokens, 16)


def test_a_vit_takes_the_third_entry() -> None:
    site = Site(16, 2, Grid(8, 8, 1), 0, 0, 1, "vit")
    assert agent_attention(site).core.agents == (7, 7)
    assert agent_attention(site, agent_tokens=[9, 16, 25, 49]).core.agents == (5, 5)


@pytest.mark.parametrize(("asked", "options"), [(81, {}), ([3, 9], {}), (25, {"window": 4}), (9, {"stripe": 2})])
def test_refuses_more_agents_than_tokens(asked: int | list[int], options: dict) -> None:
    message = (
        r"agent_tokens=.* is a grid of \dx\d agents on a \dx\d map; set attention.agent_tokens=auto, or to a smaller"
    )
    with pytest.raises(Refused, match=message):
        mixer(Grid(8, 8), agent_tokens=asked, **options)


def test_more_agents_than_trained_may_be_asked_for_larger_maps() -> None:
    """As in detection: the last stage of a PVT was trained on 7x7 tokens and has 28x28 agents."""
    module, grid = mixer(Grid(2, 2), agent_tokens=[5, 5], trained_agent_tokens=[2, 2]), Grid(6, 9)
    assert module.core.agents == (5, 5) and module(tokens(grid), grid).x.shape == (2, grid.tokens, 16)


def test_windows_do_not_see_each_other() -> None:
    grid = Grid(6, 8)
    module, x = mixer(grid, window=[3, 4]), tokens(grid)
    other = x.clone().view(2, 6, 8, 16)
    other[:, 3:, 4:] += 1.0
    change = (module(other.flatten(1, 2), grid).x - module(x, grid).x).view(2, 6, 8, 16).abs().amax(-1)
    assert change[:, 3:, 4:].min() > 1e-6
    change[:, 3:, 4:] = 0
    assert change.max() < 1e-12


def test_given_agents_and_a_scale_of_their_own() -> None:
    q, k, v = (tokens(Grid(3, 4), 8).unsqueeze(1) + shift for shift in (0.0, 0.5, 1.0))
    agents = q[:, :, :5]
    expected = (q @ agents.mT * 0.7).softmax(-1) @ ((agents @ k.mT / 8**0.5).softmax(-1) @ v)
    torch.testing.assert_close(attend_through(q, k, v, agents, scatter_scale=0.7), expected)


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        (Grid(4, 6, 1), {}),
        (Grid(4, 6), {"bias": False}),
        (Grid(4, 6), {"sr_ratio": 2, "qkv_bias": False}),
        (Grid(5, 6), {"window": 4, "trained_agent_tokens": 4}),
    ],
)
def test_every_parameter_learns_and_extreme_inputs_keep_gradients_finite(grid: Grid, options: dict) -> None:
    module = mixer(grid, **options).float()
    for scale in (1.0, 1e4, 0.0):
        module.zero_grad()
        module(tokens(grid).float() * scale, grid).x.square().sum().backward()
        grads = {name: parameter.grad for name, parameter in module.named_parameters()}
        assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
        if scale == 1.0:
            assert all(grad.abs().sum() > 0 for grad in grads.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("grid", "options"), [(Grid(5, 7, 1), {}), (Grid(5, 7), {"sr_ratio": 2}), (Grid(9, 4), {})])
def test_half_precision_stays_close(dtype: torch.dtype, grid: Grid, options: dict) -> None:
    module, x = mixer(Grid(5, 7, grid.prefix), **options).float(), tokens(grid).float()
    exact = module(x, grid).x
    with torch.autocast("cpu", dtype=dtype):
        mixed = module(x, grid).x
    pure = module.to(dtype)(x.to(dtype), grid).x
    # a few roundings of 2^-8 (bfloat16) or 2^-11 (float16) in a row
    bound = 0.03 if dtype == torch.bfloat16 else 0.004
    for half in (mixed, pure):
        assert half.dtype == dtype and (half.float() - exact).norm() <= bound * exact.norm()


@pytest.mark.full  # with the defaults: tests/contract/test_full_graph.py
@pytest.mark.parametrize("options", [{}, {"sr_ratio": 2, "trained_agent_tokens": 4}, {"window": 4}])
def test_compiles_as_one_graph(options: dict) -> None:
    grid = Grid(5, 7)
    module, x = mixer(grid, **options).float(), tokens(grid).float()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, grid).x, module(x, grid).x)


@pytest.mark.parametrize("asked", [8, 0, -4, [0, 3], [3.0, 3], True, "many", [2, 2, 2]])
def test_refuses_agents_that_form_no_grid(asked: int | list[int]) -> None:
    message = r"agent_attention: agent_tokens must be a square number, \[height, width\] or auto, got .*; use e.g. 9"
    with pytest.raises(ValueError, match=message):
        agent_grid(asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "agent_attention: kernel_size must be odd and positive, got 4; set attention.kernel_size"),
        ({"kernel_size": -1}, "agent_attention: kernel_size must be odd and positive, got -1; set"),
        ({"bias_size": 0}, "agent_attention: bias_size must be a whole number of at least 1, got 0; set"),
        ({"sr_ratio": 0}, "attention: sr_ratio must be a whole number of at least 1, got 0; set attention.sr_ratio"),
        ({"window": 0}, "window must be a side of at least 1, or two, got 0"),
    ],
)
def test_refuses_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixer(Grid(4, 4), **options)


def test_refuses_channels_that_do_not_divide_into_heads() -> None:
    with pytest.raises(Refused, match=r"16 channels do not divide into 3 heads; change model\.num_heads"):
        mixer(Grid(4, 4), heads=3)


def test_class_tokens_are_refused_where_keys_are_shortened_or_windowed() -> None:
    assert mixer(Grid(4, 4)).accepts.prefix == "attended"
    assert mixer(Grid(4, 4), sr_ratio=2).accepts.prefix == "refused"
    assert mixer(Grid(4, 4), window=2, agent_tokens=4).accepts.prefix == "refused"


def test_core_has_no_bias_parameters_without_biases() -> None:
    assert {name for name, _ in AgentCore(2, 8, (3, 3)).named_parameters()} == {"dwc.weight", "dwc.bias"}


def test_yaml_states_the_defaults() -> None:
    path = Path(__file__).parents[3] / "conf/attention/agent.yaml"
    options = {key: value for key, value in yaml.safe_load(path.read_text()).items() if not key.startswith("_")}
    assert options == defaults_of(agent_attention, options)
