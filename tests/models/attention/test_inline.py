"""InLine attention: the paper's equations and claims, every option, any map, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear_attention import inline_local
from models.attention import Grid, Site
from models.attention.contract.heads import merge_heads
from models.attention.inline import FEATURES, InLineCore, inline_attention
from models.layers.block import Block

GRIDS = [Grid(5, 8), Grid(8, 5, 1), Grid(3, 3, 2)]


def mixer(grid: Grid, dim: int = 16, heads: int = 2, **options: object) -> nn.Module:
    torch.manual_seed(0)
    module = inline_attention(Site(dim, heads, grid, 0, 0, 1, "hierarchical"), **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double()


def tokens(grid: Grid, dim: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, grid.tokens, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def heads_of(grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(2, 2, grid.tokens, 8, generator=generator, dtype=torch.float64) for _ in range(3))


def local(core: InLineCore, v: Tensor, grid: Grid, weight_BC33: Tensor | None = None) -> Tensor:
    lepe = (None, None) if core.lepe is None else (core.lepe.weight, core.lepe.bias)
    return inline_local(v, grid, grid, weight_BC33, *lepe)


@pytest.mark.parametrize("feature", FEATURES)
def test_the_covariance_form_is_the_paper_s_equation(feature: str) -> None:
    grid = Grid(4, 6)
    q, k, v = heads_of(grid)
    core = InLineCore(2, 8, feature, residual=False)
    phi_q, phi_k, scale = FEATURES[feature](q), FEATURES[feature](k), 8**-0.5
    state = phi_k.mT @ v * scale / grid.tokens
    paper = phi_q @ state + (1 - scale * phi_q @ phi_k.mean(2, keepdim=True).mT) * v.mean(2, keepdim=True)
    torch.testing.assert_close(core(q, k, v, grid, grid), paper)


def test_queries_of_one_direction_are_told_apart() -> None:
    """The paper's first claim: linear attention with a quotient gives q and 2q the same weights, this one does not."""
    q, k, _ = (x.abs() for x in heads_of(Grid(3, 4)))
    grid, core = Grid(3, 4), InLineCore(2, 8, residual=False)

    def quotient(q: Tensor) -> Tensor:
        weights = q @ k.mT
        return weights / weights.sum(-1, keepdim=True)

    torch.testing.assert_close(quotient(2 * q), quotient(q))
    weights, doubled = (core.matrix(scaled, k, grid, grid) for scaled in (q, 2 * q))
    assert (weights - doubled).abs().max() > 0.01
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("options", [{}, {"lepe": True}, {"residual": False}, {"feature": "relu"}])
def test_matrix_times_values_plus_convolutions_is_forward(grid: Grid, options: dict) -> None:
    module, x = mixer(grid, **options), tokens(grid)
    v = module.qkv(x).chunk(3, -1)[2].unflatten(2, (2, 8)).transpose(1, 2)
    convolved = local(module.core, v, grid, **module.core.context(x))
    assert (convolved[:, :, : grid.prefix] == 0).all()
    heads = module.attention_matrix(x, grid).double() @ v + convolved
    torch.testing.assert_close(module(x, grid).x, module.proj(merge_heads(heads)), rtol=1e-5, atol=1e-5)


def test_every_image_makes_a_convolution_of_its_own_per_channel() -> None:
    """Weights W2 GELU(W1 mean x) within each head, applied to the values of that image alone."""
    grid = Grid(4, 5, 1)
    module, x = mixer(grid), tokens(grid)
    first, _, second = module.core.residual
    weights = module.core.context(x)["weight_BC33"]
    v = module.qkv(x).chunk(3, -1)[2]
    for image in range(2):
        mean = x[image].mean(0)
        for head, rows in enumerate((slice(0, 8), slice(8, 16))):
            hidden = F.gelu(first.weight[rows, :, 0] @ mean[rows] + first.bias[rows])
            made = slice(72 * head, 72 * head + 72)
            expected = (second.weight[made, :, 0] @ hidden + second.bias[made]).view(8, 3, 3)
            torch.testing.assert_close(weights[image, rows], expected)
        map_ = v[image, 1:].T.view(1, 16, 4, 5)
        expected = F.conv2d(map_, weights[image].unsqueeze(1), padding=1, groups=16)[0].flatten(1).T
        heads = v.unflatten(2, (2, 8)).transpose(1, 2)
        got = merge_heads(local(module.core, heads, grid, weights))[image, 1:]
        torch.testing.assert_close(got, expected)


def test_a_large_mean_of_the_keys_costs_no_accuracy() -> None:
    """It cancels in the covariance; in the paper's form two numbers of its size are subtracted."""
    grid = Grid(7, 7)
    q, k, v = heads_of(grid)
    core = InLineCore(2, 8, residual=False)
    expected = core(q, k, v, grid, grid)
    got = core(q.float(), k.float() + 1000, v.float(), grid, grid)
    assert (got - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("options", [{}, {"sr_ratio": 2}, {"window": 3}, {"stripe": 2}, {"lepe": True, "stripe": 3}])
def test_any_map_and_every_parameter_learns(grid: Grid, options: dict) -> None:
    if grid.prefix and set(options) & {"sr_ratio", "window", "stripe"}:
        assert mixer(grid, **options).accepts.prefix == "refused"
        return
    module = mixer(grid, **options)
    for other in (grid, Grid(7, 4, grid.prefix), Grid(1, 1, grid.prefix)):
        x = module(tokens(other), other).x
        assert x.shape == (2, other.tokens, 16) and x.isfinite().all()
    module(tokens(grid), grid).x.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_the_mean_of_the_block_s_input_where_cswin_takes_it() -> None:
    """The weights see the tokens before the norm: a shift that the norm removes changes them."""
    grid = Grid(4, 4)
    x = tokens(grid)
    for residual_input, changes in (("stream", True), ("normed", False)):
        block = Block(16, mixer(grid, residual_input=residual_input), mlp_ratio=0).double()
        moved = block(x + 3.0, grid)[0] - 3.0
        assert torch.allclose(moved, block(x, grid)[0], atol=1e-6) != changes
        assert block.attn.reads_stream == (residual_input == "stream")


def test_stripes_take_the_weights_of_their_half_of_the_channels() -> None:
    grid = Grid(4, 6)
    module, x = mixer(grid, stripe=2), tokens(grid)
    assert len(module.cores) == 2 and module.cores[0].num_heads == 1
    seen = [core.context(half)["weight_BC33"] for core, half in zip(module.cores, x.chunk(2, -1), strict=True)]
    given = []
    for core in module.cores:
        core.register_forward_hook(lambda *args: given.append(args[2]["weight_BC33"]), with_kwargs=True)
    module(x, grid)
    for weights, stripes, expected in zip(given, (3, 2), seen, strict=True):
        torch.testing.assert_close(weights, expected.repeat_interleave(stripes, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype: torch.dtype) -> None:
    grid = Grid(5, 7, 1)
    module, x = mixer(grid, lepe=True).float(), tokens(grid).float()
    exact = module(x, grid).x
    with torch.autocast("cpu", dtype=dtype):
        mixed = module(x, grid).x
    bound = 0.03 if dtype == torch.bfloat16 else 0.004  # a few roundings of 2^-8 or 2^-11 in a row
    for half in (mixed, module.to(dtype)(x.to(dtype), grid).x):
        assert half.dtype == dtype and (half.float() - exact).norm() <= bound * exact.norm()


@pytest.mark.full  # with the defaults: tests/contract/test_full_graph.py
@pytest.mark.parametrize("options", [{}, {"lepe": True, "stripe": 3}, {"sr_ratio": 2}])
def test_compiles_as_one_graph(options: dict) -> None:
    grid = Grid(6, 7)
    module, x = mixer(grid, **options).float(), tokens(grid).float()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, grid).x, module(x, grid).x)


def test_an_empty_batch() -> None:
    grid = Grid(3, 3)
    assert mixer(grid)(tokens(grid)[:0], grid).x.shape == (0, 9, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"feature": "elu"},
            r"inline_attention: feature must be one of identity, relu, leaky_relu, exp, got 'elu'; set",
        ),
        ({"residual_input": "x"}, r"inline_attention: residual_input must be normed or stream, got 'x'; set attention"),
        ({"window": 2, "stripe": 2}, r"window, stripe and shortened keys exclude each other; set all but one of these"),
        ({"sr_ratio": 2, "stripe": 2}, r"window, stripe and shortened keys exclude each other"),
        ({"sr_ratio": [2]}, None),
        ({"stripe": 0}, r"stripe must be tokens, a whole number of at least 1, got 0; use e.g. 7, or all"),
        (
            {"stripe": 2, "heads": 1},
            r"stripes in two directions share the heads, and 1 is odd; set attention.stripe=all",
        ),
    ],
)
def test_refuses_wrong_options(options: dict, message: str | None) -> None:
    if message is None:
        assert mixer(Grid(4, 4), **options).reduce.ratio == 2
        return
    with pytest.raises(ValueError, match=message):
        mixer(Grid(4, 4), **options)
