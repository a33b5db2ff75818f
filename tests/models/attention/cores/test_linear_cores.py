"""Cores that are linear in tokens: what each paper claims of its own, and what holds for all of them."""

import pytest
import torch
from timm.models.xcit import XCA
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.attention import Grid, Mixer, Refused, Site
from models.attention.cores.efficient import efficient_attention
from models.attention.cores.flow import FlowCore, flow_attention
from models.attention.cores.galerkin import fourier_attention, galerkin_attention
from models.attention.cores.hedgehog import HedgehogCore, hedgehog_attention
from models.attention.cores.linear import LinearCore, linear_attention
from models.attention.cores.xca import xca_attention

CORES = {
    "efficient": efficient_attention,
    "hedgehog": hedgehog_attention,
    "flow": flow_attention,
    "linear": linear_attention,
    "galerkin": galerkin_attention,
    "fourier": fourier_attention,
    "xca": xca_attention,
}
GRID = Grid(5, 6)


def made(name: str, grid: Grid = GRID, **options) -> Mixer:
    torch.manual_seed(0)
    return CORES[name](Site(32, 4, grid, 0, 0, 1, "vit"), **options).eval()


def tokens(number: int = GRID.tokens) -> Tensor:
    return torch.randn(2, number, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CORES)
def test_tokens_are_a_set(name: str) -> None:
    """In another order they give the same in that order; class tokens are tokens like others."""
    mixer, x, order = made(name), tokens(), torch.randperm(GRID.tokens)
    torch.testing.assert_close(mixer(x[:, order], GRID).x, mixer(x, GRID).x[:, order])
    torch.testing.assert_close(mixer(x, Grid(1, 28, prefix=2)).x, mixer(x, GRID).x)


@pytest.mark.parametrize("name", CORES)
def test_four_times_the_tokens_cost_four_times_as_much(name: str) -> None:
    costs = []
    for grid in (GRID, Grid(10, 12)):
        with FlopCounterMode(display=False) as counter:
            made(name)(tokens(grid.tokens), grid)
        costs.append(counter.get_total_flops())
    assert costs[1] == 4 * costs[0]


@pytest.mark.parametrize("name", [name for name in CORES if made(name).has_matrix])
def test_the_matrix_is_what_is_computed(name: str) -> None:
    mixer, x = made(name), tokens()
    weights = mixer.attention_matrix(x, GRID)
    assert weights.shape == (2, 4, 30, 30)
    torch.testing.assert_close(mixer.attend(weights, x, GRID), mixer(x, GRID).x)
    one = torch.ones(2, 4, 30)
    assert torch.allclose(weights.sum(-1), one) == mixer.core.row_stochastic
    assert bool((weights >= 0).all()) == (name not in ("fourier", "galerkin"))


def test_those_without_a_matrix() -> None:
    assert {name for name in CORES if not made(name).has_matrix} == {"xca"}


def test_hedgehog_starts_closer_to_softmax_than_nothing() -> None:
    """At unit variance, 32 channels and 197 tokens: the divergences that a measurement of the authors' code gives."""
    q, k = (torch.randn(1, 3, 197, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    softmax = (q @ k.mT * 32**-0.5).softmax(-1)

    def divergence(weights: Tensor) -> float:
        return (softmax * (softmax.log() - weights.log())).sum(-1).mean().item()

    grid = Grid(1, 197)
    own = divergence(HedgehogCore(3, 32, 32).matrix(q, k, grid, grid))
    joint = divergence(HedgehogCore(3, 32, 32, feature="joint").matrix(q, k, grid, grid))
    uniform = divergence(torch.full_like(softmax, 1 / 197))
    assert joint == pytest.approx(0.342, abs=0.02)
    assert own == pytest.approx(0.355, abs=0.02)
    assert uniform == pytest.approx(0.491, abs=0.02)


def test_hedgehog_learns_softmax_attention() -> None:
    """Its distillation: the cross-entropy of the rows falls far below that of the start."""
    torch.manual_seed(0)
    q, k, grid = torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16), Grid(8, 8)
    core, softmax = HedgehogCore(2, 16, 16), (1.5 * q @ k.mT * 16**-0.5).softmax(-1)
    optimizer, losses = torch.optim.Adam(core.parameters(), 1e-2), []
    for _ in range(100):
        losses.append((softmax * (softmax.log() - core.matrix(q, k, grid, grid).log())).sum(-1).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_flow_is_conserved() -> None:
    """A source sends out as much in all as it has: what flows into the sinks sums up to the number of sources."""
    core = FlowCore(outer_eps=False).double()
    q, k = torch.randn(1, 2, 40, 16).double(), torch.randn(1, 2, 24, 16).double()
    q, k = q.sigmoid(), k.sigmoid()
    outgoing = core._sum(k, q)
    assert core._sum(q, k / outgoing).sum(2).flatten().tolist() == pytest.approx([24, 24], rel=1e-4)
    _, _, competing, allocated = core._flows(q.logit(), k.logit())
    assert competing.sum(2).flatten().tolist() == pytest.approx([24, 24])
    assert bool(((allocated > 0) & (allocated < 1)).all())


def test_linear_rows_sum_to_the_temperature_or_less() -> None:
    core, grid = LinearCore(1, 32), Grid(1, 200)
    q, k = torch.randn(1, 1, 200, 32), torch.randn(1, 1, 200, 32)
    torch.testing.assert_close(core.matrix(q, k, grid, grid).sum(-1), torch.full((1, 1, 200), 32**-0.5))
    few = core.matrix(q[:, :, :4], k[:, :, :4], Grid(1, 4), Grid(1, 4))
    assert bool((few.sum(-1) < 0.9 * 32**-0.5).all())
    shares = (q[:, :, :4].relu() @ k[:, :, :4].relu().mT) / 100 * 32**-0.5
    torch.testing.assert_close(few, shares)


@pytest.mark.parametrize("name", ["galerkin", "fourier"])
def test_the_length_of_keys_is_irrelevant_and_evaluation_repeats(name: str) -> None:
    """In training too: the dropout of the released code is a fault."""
    mixer, x = made(name, qkv_bias=False).train(), tokens()
    before = mixer(x, GRID).x
    torch.testing.assert_close(mixer(x, GRID).x, before)
    with torch.no_grad():
        mixer.qkv.weight[32:64] *= 5
    torch.testing.assert_close(mixer(x, GRID).x, before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["galerkin", "fourier"])
def test_positions_tell_tokens_apart(name: str) -> None:
    mixer, same = made(name, positions=True), torch.ones(1, GRID.tokens, 32)
    out = mixer(same, GRID).x.unflatten(1, GRID[:2])
    assert out[0, 0, 0].sub(out[0, 1, 0]).abs().max() > 1e-4 and out[0, 0, 0].sub(out[0, 0, 1]).abs().max() > 1e-4
    assert mixer(tokens(31), Grid(5, 6, prefix=1)).x.shape == (2, 31, 32)
    x = tokens()  # the weights pass on where values come from, too
    torch.testing.assert_close(mixer.attend(mixer.attention_matrix(x, GRID), x, GRID), mixer(x, GRID).x)
    with pytest.raises(Refused, match=r"no value part has; leave out attention/value, or set"):
        made(name, positions=True, value=torch.nn.Identity)


def test_cross_covariance_equals_timm() -> None:
    theirs, ours = XCA(32, num_heads=4, qkv_bias=True).eval(), made("xca")
    with torch.no_grad():
        theirs.temperature.copy_(torch.rand(4, 1, 1) + 0.5)
    state = theirs.state_dict()
    ours.load_state_dict({key.replace("temp", "core.temp"): value for key, value in state.items()})
    x = tokens()
    torch.testing.assert_close(ours(x, GRID).x, theirs(x))


def test_cross_covariance_does_not_see_the_length_of_channels() -> None:
    mixer, x = made("xca", qkv_bias=False), tokens()
    before = mixer(x, GRID).x
    with torch.no_grad():
        mixer.qkv.weight[:64] *= torch.rand(64, 1) + 0.5
    torch.testing.assert_close(mixer(x, GRID).x, before)


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"hedgehog: skip needs feature_dim=8, got 4; set attention.feature_dim=null"):
        made("hedgehog", skip=True, feature_dim=4)
    with pytest.raises(ValueError, match=r"linear: denominator_min must be a number of at least 1e-06, got 0"):
        made("linear", denominator_min=0)
    with pytest.raises(Refused, match=r"CrossCovarianceCore cannot work on keys that are not its queries"):
        made("xca", sr_ratio=2)
