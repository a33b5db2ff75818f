"""Properties of focused linear attention: the paper's formula and claims, number ranges, other maps, refusals."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from kernels.linear_attention import focus, focused_features, focused_local
from models.attention import Grid, Refused, Site
from models.attention.focused_linear import FocusedLinearCore, focused_linear_attention
from models.attention.multihead import MultiHead
from tests.models.attention.defaults import defaults_of

GRIDS = [Grid(5, 8), Grid(8, 5, 1), Grid(4, 4, 2)]


def mixer(grid: Grid, dim: int = 16, heads: int = 2, **options: object) -> MultiHead:
    torch.manual_seed(0)
    module = focused_linear_attention(Site(dim, heads, grid, 0, 0, 1, "hierarchical"), **options)
    for parameter in (module.core.scale, module.core.positional_encoding):  # they start at zero
        torch.nn.init.normal_(parameter)
    return module.double()


def tokens(grid: Grid, dim: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, grid.tokens, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def heads_of(module: MultiHead, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Grid]:
    return module._project(x, grid)


def without_local(module: MultiHead) -> MultiHead:
    """The convolution off: what remains is linear attention alone."""
    torch.nn.init.zeros_(module.core.dwc.weight), torch.nn.init.zeros_(module.core.dwc.bias)
    return module


def local(core: FocusedLinearCore, v: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
    convolutions = [(conv.weight, conv.bias) for conv in (core.dwc, core.lepe) if conv is not None]
    return focused_local(v, grid, kv_grid, *convolutions)


@pytest.mark.parametrize("power", [1, 2, 2.5, 3, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_formula_of_the_paper(grid: Grid, power: float) -> None:
    """Explicit N×N weights from features of whole tokens (C channels), then the convolution head by head."""
    module, x = mixer(grid, power=power), tokens(grid)
    q, k, v, _ = heads_of(module, x, grid)
    q, k, v = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
    k = k + F.pad(module.core.positional_encoding, (0, 0, grid.prefix, 0))

    def features(t: Tensor) -> Tensor:
        t = (t.relu() + 1e-6) / F.softplus(module.core.scale)
        return t.norm(dim=-1, keepdim=True) / (t**power).norm(dim=-1, keepdim=True) * t**power

    q, k = features(q), features(k)
    outputs = []
    for head in range(2):
        c = slice(8 * head, 8 * head + 8)
        weights = q[..., c] @ k[..., c].mT / grid.tokens
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
        v_map = v[:, grid.prefix :, c].mT.unflatten(2, grid[:2])
        local = module.core.dwc(v_map).flatten(2).mT
        outputs.append(weights @ v[..., c] + F.pad(local, (0, 0, grid.prefix, 0)))
    torch.testing.assert_close(module(x, grid).x, module.proj(torch.cat(outputs, -1)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"lepe": True}, {"sr_ratio": 2}, {"kv_pool": 3}])
def test_matrix_times_values_plus_convolution_is_forward(options: dict) -> None:
    grid = Grid(5, 8)
    module, x = mixer(grid, **options), tokens(grid)
    _, _, v, kv_grid = heads_of(module, x, grid)
    weights = module.attention_matrix(x, grid)
    assert weights.shape == (2, 2, 40, kv_grid.tokens) and weights.ge(0).all()
    heads = weights @ v + local(module.core, v, grid, kv_grid)
    torch.testing.assert_close(module(x, grid).x, module.proj(heads.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("power", [1, 2.5, 3, 8, 32])
def test_focusing_keeps_the_length_and_turns_towards_the_largest_channel(power: float) -> None:
    x = torch.rand(2, 3, 7, 4, dtype=torch.float64) + 1e-6
    sharp = focus(x, power)
    torch.testing.assert_close(sharp.pow(2).sum((1, 3)), x.pow(2).sum((1, 3)))
    share, share_before = (t.amax((1, 3)) / t.sum((1, 3)) for t in (sharp, x))
    assert (share > share_before).all() if power > 1 else torch.allclose(sharp, x)


@pytest.mark.parametrize("power", [1, 3, 8, 32])
def test_no_power_leaves_the_range_of_float32(power: float) -> None:
    """Tokens without any positive channel, tiny and huge ones: finite features, outputs and gradients."""
    grid = Grid(2, 3)
    rows = torch.stack([torch.zeros(8), -torch.ones(8), torch.rand(8) * 1e-6, torch.rand(8) * 1e4, torch.rand(8)])
    q = torch.cat([rows, torch.linspace(-60000, 60000, 8)[None]]).view(1, 6, 2, 4).transpose(1, 2).requires_grad_()
    core = FocusedLinearCore(2, 4, grid, power=power)
    out = core(q, q, q, grid, grid)
    out.pow(2).mean().backward()
    features = focused_features(q, q, power, F.softplus(core.scale).flatten())[0]
    assert out.isfinite().all() and q.grad.isfinite().all() and features.isfinite().all()
    lengths = ((q.relu() + 1e-6) / F.softplus(torch.zeros(()))).pow(2).sum((1, 3))
    torch.testing.assert_close(features.pow(2).sum((1, 3)), lengths)
    assert all(parameter.grad.isfinite().all() for parameter in core.parameters())


def test_focusing_in_float32_equals_the_plain_formula_in_float64() -> None:
    x = (torch.randn(2, 3, 9, 4, dtype=torch.float64).relu() + 1e-6).requires_grad_()
    plain = x**8 * x.pow(2).sum((1, 3), keepdim=True).sqrt() / (x**8).pow(2).sum((1, 3), keepdim=True).sqrt()
    weight = torch.randn_like(plain)
    (expected,) = torch.autograd.grad((plain * weight).sum(), x)
    x32 = x.detach().float().requires_grad_()
    (got,) = torch.autograd.grad((focus(x32, 8) * weight.float()).sum(), x32)
    torch.testing.assert_close(focus(x32, 8).double(), plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_order_of_tokens_does_not_matter_without_convolution_and_position() -> None:
    grid = Grid(4, 6)
    module, x = without_local(mixer(grid)), tokens(grid)
    torch.nn.init.zeros_(module.core.positional_encoding)
    order = torch.randperm(24)
    torch.testing.assert_close(module(x[:, order], grid).x, module(x, grid).x[:, order])


def test_position_and_convolution_tell_the_order_of_tokens() -> None:
    grid, order = Grid(4, 6), torch.randperm(24)
    x = tokens(grid)
    conv_only = mixer(grid)
    torch.nn.init.zeros_(conv_only.core.positional_encoding)
    for module in (without_local(mixer(grid)), conv_only):
        assert not torch.allclose(module(x[:, order], grid).x, module(x, grid).x[:, order], atol=1e-4)


def test_the_convolution_restores_the_rank() -> None:
    """Without it the weights of a head have rank D at most (the paper's second claim), with it nearly full rank."""
    grid = Grid(6, 6)
    module, x = mixer(grid, dim=8, heads=2), tokens(grid, 8, batch=1)
    q, k, _, _ = heads_of(module, x, grid)
    assert torch.linalg.matrix_rank(module.core.matrix(q, k, grid, grid)).max() <= 4
    shifts = local(module.core, torch.eye(36, dtype=torch.float64).view(36, 1, 36, 1).expand(-1, 2, -1, 4), grid, grid)
    local_NN = (shifts[:, 0, :, 0] - module.core.dwc.bias[0]).mT  # the convolution of one channel as an N×N matrix
    total = module.core.matrix(q, k, grid, grid)[0, 0] + local_NN
    assert torch.linalg.matrix_rank(total) > 30


@pytest.mark.parametrize("options", [{}, {"lepe": True}, {"kv_pool": 3}, {"window": [3, 4]}])
def test_transposed_map_with_transposed_weights_gives_the_transposed_output(options: dict) -> None:
    """Height and width are nowhere taken for each other."""
    flipped = {key: value[::-1] if isinstance(value, list) else value for key, value in options.items()}
    # pooled values are enlarged along the row-major sequence, which has no transpose: leave the convolution out there
    prepare = without_local if "kv_pool" in options else lambda module: module
    module, mirrored = prepare(mixer(Grid(6, 8), **options)), mixer(Grid(8, 6), **flipped)
    trained = module.core.kv_grid
    state = module.state_dict()
    state = {name: value.mT if value.dim() == 4 else value for name, value in state.items()}
    table = state["core.positional_encoding"].unflatten(1, trained[:2])
    mirrored.load_state_dict(state | {"core.positional_encoding": table.transpose(1, 2).flatten(1, 2)})
    x = tokens(Grid(6, 8))
    mirrored_x, expected = (t.view(2, 6, 8, 16).transpose(1, 2).flatten(1, 2) for t in (x, module(x, Grid(6, 8)).x))
    torch.testing.assert_close(mirrored(mirrored_x, Grid(8, 6)).x, expected)


def test_shortened_values_are_enlarged_along_the_sequence() -> None:
    module = mixer(Grid(4, 6), sr_ratio=2)
    v = tokens(Grid(2, 3)).unflatten(2, (2, 8)).transpose(1, 2)
    sequence = F.interpolate(v.transpose(1, 2).flatten(2).mT, size=24, mode="linear")
    large = sequence.mT.unflatten(2, (2, 8)).transpose(1, 2)
    expected = local(module.core, large, Grid(4, 6), Grid(4, 6))
    torch.testing.assert_close(local(module.core, v, Grid(4, 6), Grid(2, 3)), expected)


def test_position_encoding_is_exact_on_the_map_of_training_and_smooth_on_others() -> None:
    core = FocusedLinearCore(2, 3, Grid(4, 6, 1))
    core.positional_encoding.data = torch.arange(6.0).repeat(4).view(1, 24, 1).expand(1, 24, 6).clone()
    exact = core.position(Grid(4, 6, 1))
    assert exact.shape == (1, 2, 25, 3) and exact[:, :, 0].eq(0).all()
    assert exact[:, :, 1:].transpose(1, 2).flatten(2).equal(core.positional_encoding)
    other = core.position(Grid(8, 12))[0, 0, :, 0].view(8, 12)
    torch.testing.assert_close(other, other[:1].expand(8, 12))
    assert other[0].diff().gt(0).all()


@pytest.mark.parametrize("options", [{}, {"sr_ratio": 2}, {"kv_pool": 3}, {"window": 4}, {"lepe": True}])
def test_runs_on_other_maps_than_it_is_built_for(options: dict) -> None:
    module = mixer(Grid(6, 6), **options)
    for grid in (Grid(9, 4), Grid(2, 13), Grid(1, 1)):
        x = module(tokens(grid), grid).x
        assert x.shape == (2, grid.tokens, 16) and x.isfinite().all()


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        (Grid(4, 6, 1), {}),
        (Grid(4, 6), {"lepe": True, "power": 2.5}),
        (Grid(4, 6), {"sr_ratio": 2, "qkv_bias": False}),
        (Grid(4, 6), {"kv_pool": 3}),
        (Grid(5, 6), {"window": 4, "power": 8}),
    ],
)
def test_every_parameter_learns_and_extreme_inputs_keep_gradients_finite(grid: Grid, options: dict) -> None:
    site = Site(16, 2, grid, 0, 0, 1, "hierarchical")
    torch.manual_seed(0)
    module = focused_linear_attention(site, **options)
    for scale in (1.0, 1e4, 0.0):
        module.zero_grad()
        module(tokens(grid).float() * scale, grid).x.square().sum().backward()
        grads = [parameter.grad for parameter in module.parameters()]
        assert all(grad is not None and grad.isfinite().all() for grad in grads)
        if scale == 1.0:
            assert all(grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("power", [3, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("grid", "options"), [(Grid(5, 7, 1), {}), (Grid(5, 7), {"sr_ratio": 2}), (Grid(9, 4), {})])
def test_half_precision_stays_close(dtype: torch.dtype, grid: Grid, options: dict, power: float) -> None:
    module, x = mixer(Grid(5, 7, grid.prefix), power=power, **options).float(), tokens(grid).float()
    exact = module(x, grid).x
    with torch.autocast("cpu", dtype=dtype):
        mixed = module(x, grid).x
    pure = module.to(dtype)(x.to(dtype), grid).x
    # roundings of 2^-8 (bfloat16) or 2^-11 (float16) of the queries and keys, enlarged by the power
    bound = (0.01 if dtype == torch.bfloat16 else 0.00125) * power
    for half in (mixed, pure):
        assert half.dtype == dtype and (half.float() - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("power", [3, 32])
def test_large_activations_in_float16(power: float) -> None:
    """Queries and keys far above 40, whose cubes exceed the range of float16."""
    grid = Grid(5, 7)
    module, x = mixer(grid, power=power).float(), tokens(grid).float() * 3000
    x[0] = -x[0].abs()
    with torch.autocast("cpu", dtype=torch.float16):
        q = heads_of(module, x, grid)[0]
        out = module(x, grid).x
    assert q.abs().max() > 1000 and out.isfinite().all()


def test_shapes_alone_can_be_computed_on_the_meta_device() -> None:
    grid = Grid(5, 7)
    module = mixer(grid).to("meta")
    assert module(torch.empty(2, 35, 16, device="meta", dtype=torch.float64), grid).x.shape == (2, 35, 16)


@pytest.mark.full  # with the defaults: tests/contract/test_full_graph.py
@pytest.mark.parametrize("options", [{}, {"sr_ratio": 2}, {"window": 4, "lepe": True}])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_as_one_graph(options: dict, autocast: bool) -> None:
    grid = Grid(5, 7)
    module, x = mixer(grid, **options).float(), tokens(grid).float()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got, expected = compiled(x, grid).x, module(x, grid).x
    bound = 2**-8 if autocast else 1e-6  # one rounding of bfloat16: the graph may keep more digits in between
    assert got.dtype == expected.dtype and (got - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": 0.5}, "focused_linear_attention: power must be at least 1, got 0.5; the paper uses 3"),
        (
            {"kernel_size": 4},
            "focused_linear_attention: kernel_size must be odd and positive, got 4; set",
        ),
        ({"kernel_size": -1}, "focused_linear_attention: kernel_size must be odd and positive, got -1; set"),
        (
            {"sr_ratio": 2, "kv_pool": 7},
            "attention: sr_ratio and kv_pool both shorten the keys, got 2 and 7; set sr_ratio=1 or kv",
        ),
        ({"sr_ratio": 0}, "attention: sr_ratio must be a whole number of at least 1, got 0; set"),
        ({"kv_pool": 0}, "attention: kv_pool must be a whole number of at least 1, got 0; set"),
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
    for options in ({"sr_ratio": 2}, {"kv_pool": 3}, {"window": 2}):
        assert mixer(Grid(4, 4), **options).accepts.prefix == "refused"


def test_yaml_states_the_defaults() -> None:
    path = Path(__file__).parents[3] / "conf/attention/focused_linear.yaml"
    options = {key: value for key, value in yaml.safe_load(path.read_text()).items() if not key.startswith("_")}
    assert options == defaults_of(focused_linear_attention, options)
