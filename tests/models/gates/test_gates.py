"""What gates compute: against timm's modules where it has them, and what their papers say of them."""

import math

import pytest
import timm.layers
import torch
from timm.layers.cbam import CbamModule
from torch import Tensor, nn

from models.attention import Grid, Site
from models.gates.cbam import CBAM
from models.gates.context_broadcasting import ContextBroadcasting
from models.gates.eca import ECA, kernel_of
from models.gates.ela import ELA, SIZES
from models.gates.gaussian import GaussianAdaptive
from models.gates.pkcam import PKCAM
from models.gates.psa import PolarizedParallel, PolarizedSequential
from models.gates.se import SqueezeExcitation
from models.gates.stepnet import StepNet
from models.gates.ulsam import ULSAM
from models.layers.gated import Gate
from models.layers.tokens import to_map, to_tokens

GRID = Grid(6, 5)


def site(dim: int = 32, **changed: object) -> Site:
    return Site(dim, 4, GRID, 0, 0, 2, "hierarchical")._replace(**changed)


def made(gate: type, *given: object, seed: int = 0, **options: object) -> Gate:
    """In evaluation and float64, with weights and statistics that show."""
    torch.manual_seed(seed)
    module = gate(*(given or (site(),)), **options).double().eval()
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if name.endswith("running_var") else torch.randn_like(value))
    return module


def tokens(dim: int = 32, grid: Grid = GRID) -> Tensor:
    return torch.randn(2, grid.tokens, dim, generator=torch.Generator().manual_seed(1)).double()


def theirs(module: nn.Module, x: Tensor) -> Tensor:
    return to_tokens(module.double().eval()(to_map(x, GRID)))


def test_eca_is_that_of_timm():
    gate, x = made(ECA, site(256)), tokens(256)
    oracle = timm.layers.EcaModule(256)
    oracle.load_state_dict(gate.state_dict())
    torch.testing.assert_close(gate(x, GRID).x, theirs(oracle, x))


def test_kernels_of_eca():
    assert [kernel_of(dim) for dim in (16, 64, 256, 512, 1024, 2048)] == [3, 3, 5, 5, 5, 7]
    of_stages = [ECA(site(64, stage=s), kernel_size=[3, 5, 5, 7]).conv.kernel_size[0] for s in range(4)]
    assert of_stages == [3, 5, 5, 7]


@pytest.mark.parametrize("kernel", [3, 5])
def test_a_weight_of_eca_depends_on_its_neighbours(kernel):
    gate, x = made(ECA, kernel_size=kernel), tokens().requires_grad_()
    weights = (gate(x, GRID).x / x)[0, 0]
    (seen,) = torch.autograd.grad(weights[10], x)
    assert seen[0].abs().sum(0).nonzero().flatten().tolist() == list(range(10 - kernel // 2, 11 + kernel // 2))
    assert not seen[1].any()


def test_squeeze_excitation_is_that_of_timm():
    gate, x = made(SqueezeExcitation, site(64)), tokens(64)
    oracle = timm.layers.SqueezeExcite(64, rd_channels=4)
    oracle.load_state_dict({k: v.reshape(oracle.state_dict()[k].shape) for k, v in gate.state_dict().items()})
    torch.testing.assert_close(gate(x, GRID).x, theirs(oracle, x))


def test_cbam_is_that_of_timm():
    gate, x = made(CBAM, site(64)), tokens(64)
    oracle = CbamModule(64, rd_channels=4)
    names = {"fc1": "channel.fc1", "fc2": "channel.fc2", "conv": "spatial.conv.conv", "norm": "spatial.conv.bn"}
    wanted, state = oracle.state_dict(), {}
    for key, value in gate.state_dict().items():
        part, _, rest = key.partition(".")
        state[f"{names[part]}.{rest}"] = value.reshape(wanted[f"{names[part]}.{rest}"].shape)
    oracle.load_state_dict(state)
    torch.testing.assert_close(gate(x, GRID).x, theirs(oracle, x))


@pytest.mark.parametrize(("size", "parameters"), [("T", 5), ("B", 7), ("S", 5 * 8), ("L", 7 * 8)])
def test_sizes_of_ela(size, parameters):
    gate = ELA(site(64), size=size)
    assert sum(p.numel() for p in gate.parameters()) == 64 * parameters + 2 * 64
    assert gate.norm.num_groups == SIZES[size][2]


def test_ela_multiplies_weights_of_rows_and_columns():
    gate, x = made(ELA), tokens()
    weights = to_map(gate(x, GRID).x / x, GRID)
    crossed = weights[:, :, :1] * weights[:, :, :, :1] / weights[:, :, :1, :1]
    torch.testing.assert_close(weights, crossed)
    rows = gate.weights(to_map(x, GRID).mean(3))
    torch.testing.assert_close(weights[:, :, :, 0] / weights[:, :, :1, 0], rows / rows[:, :, :1])
    torch.testing.assert_close(gate.weights(to_map(x, GRID).mean(2)), weights[:, :, 0] / rows[:, :, :1])


def test_ela_of_a_map_that_is_constant_along_an_axis():
    """The weights of its columns then come from equal means: those far from the ends are equal."""
    wide, row = Grid(6, 20), tokens(grid=Grid(6, 1))
    gate, x = made(ELA, size="T"), row.unflatten(1, (6, 1)).expand(-1, -1, 20, -1).flatten(1, 2)
    inner = to_map(gate(x, wide).x, wide)[:, :, :, 2:-2]
    torch.testing.assert_close(inner, inner[:, :, :, :1].expand_as(inner))


@pytest.mark.parametrize("gate", [PolarizedParallel, PolarizedSequential])
def test_places_of_psa_are_near_one_half_as_released_and_not_in_the_paper(gate):
    torch.manual_seed(0)
    x = torch.randn(4, 196, 64)
    spans = {}
    for spatial in ("paper", "released"):
        torch.manual_seed(1)
        module = gate(site(64, grid=Grid(14, 14)), spatial=spatial)
        for part in (module.place_query, module.place_value):
            nn.init.normal_(part.weight, std=0.5)
        spans[spatial] = module.places(x)
    assert spans["paper"].max() - spans["paper"].min() > 0.1
    released = spans["released"] if gate is PolarizedParallel else spans["released"] - 0.5
    assert released.std() < spans["paper"].std() / 4


def test_psa_in_sequence_and_in_parallel():
    x = tokens()
    parallel, sequential = made(PolarizedParallel), made(PolarizedSequential)
    channels, places = parallel.channels(x), parallel.places(x)
    torch.testing.assert_close(parallel(x, GRID).x, x * (channels + places))
    y = x * sequential.channels(x)
    torch.testing.assert_close(sequential(x, GRID).x, y * sequential.places(y))
    assert parallel.channels(x).shape == (2, 1, 32) and parallel.places(x).shape == (2, 30, 1)


def test_ulsam_adds_a_share_that_sums_to_one_over_the_map():
    gate, x = made(ULSAM, site(64)), tokens(64)
    shares = (gate(x, GRID).x / x - 1).unflatten(2, (4, 16))
    torch.testing.assert_close(shares, shares[..., :1].expand_as(shares))
    torch.testing.assert_close(shares.sum(1), torch.ones_like(shares.sum(1)))
    assert sum(p.numel() for p in gate.parameters()) == 332


def test_stepnet_is_eca_where_means_do_not_change():
    """As in the first block of a stage, and behind a block of the same means."""
    gate, eca, x = made(StepNet), made(ECA), tokens()
    with torch.no_grad():
        eca.conv.weight.copy_(gate.conv.weight[:, :1])
    first = gate(x, GRID)
    torch.testing.assert_close(first.x, eca(x, GRID).x)
    torch.testing.assert_close(gate(x.flip(1), GRID, carry=first.carry).x, eca(x, GRID).x.flip(1))


def test_a_weight_of_stepnet_depends_on_the_change_of_its_neighbours():
    gate, x = made(StepNet, kernel_size=3), tokens()
    before = x.mean(1).clone().requires_grad_()
    result = gate(2 * x, GRID, carry=before)
    (seen,) = torch.autograd.grad((result.x / x)[0, 0, 10], before)
    assert seen[0].nonzero().flatten().tolist() == [9, 10, 11] and not seen[1].any()
    torch.testing.assert_close(result.carry, 2 * before)
    now, change = 2 * before, before  # of means that have doubled
    logits = gate.conv(torch.stack([now, change], dim=1)).squeeze(1)
    torch.testing.assert_close(result.x, 2 * x * logits.sigmoid().unsqueeze(1))


def test_stepnet_starts_anew_in_every_stage():
    first, second = (made(StepNet, site(stage=0, block=b)) for b in (0, 1))
    assert first.carries and not first.carries_across_stages
    x, carry = tokens(), None
    for gate in (first, second):
        carry = gate(x, GRID, carry=carry).carry
        assert carry.shape == (2, 32)


def test_pkcam_is_eca_in_the_first_block_of_a_stage():
    gate, x = made(PKCAM), tokens()
    eca = ECA(site()).double()
    eca.conv.load_state_dict(gate.local.state_dict())
    torch.testing.assert_close(gate(x, GRID).x, x + eca(x, GRID).x)
    assert [name for name, _ in gate.named_parameters()] == ["local.weight"]


def test_pkcam_gathers_the_last_means_of_earlier_stages():
    x, mean = tokens(), tokens().mean(1)
    gate = made(PKCAM, site(stage=2, block=1))
    carry = gate(x, GRID, {0: torch.ones(2, 16).double(), 2: mean + 9}).carry
    assert list(carry) == [0, 2] and torch.equal(carry[2], mean)
    gathered = gate.gathered(mean, {0: torch.arange(20.0).double().expand(2, -1)})
    repeated = torch.tensor([*range(20), *range(12)]).double()
    torch.testing.assert_close(gathered, gate.sources[2] * mean + gate.sources[0] * repeated)


@pytest.mark.parametrize("heads", [1, 4])
def test_gaussian_keeps_the_size_of_the_tokens(heads):
    x = tokens()
    released, sized = (made(GaussianAdaptive, heads=heads, scale=scale) for scale in ("released", "size"))
    for gate in (released, sized):  # widths that fade out no head
        gate.width.data.fill_(1.2)
    torch.testing.assert_close(sized(x, GRID).x, released(x, GRID).x * (32 // heads))
    weights = (sized(x, GRID).x / x).unflatten(2, (heads, -1))
    torch.testing.assert_close(weights.mean(3), torch.ones_like(weights.mean(3)))


@pytest.mark.parametrize("scale", ["size", "released"])
def test_gaussian_of_equal_features_has_a_gradient(scale):
    gate, x = GaussianAdaptive(site(), scale=scale), torch.full((1, 30, 32), 2.0, requires_grad=True)
    gate(x, GRID).x.sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in gate.parameters())


def test_gaussian_is_a_product_of_normalised_densities():
    gate, x = made(GaussianAdaptive, heads=2, gaussians=3, scale="released"), tokens()
    away = (x.unflatten(2, (2, 16)) - x.unflatten(2, (2, 16)).mean(3, keepdim=True)).unsqueeze(4)
    deviation = x.unflatten(2, (2, 16)).std(3, keepdim=True).unsqueeze(4)
    z = (away - gate.offset[:, None]) / deviation
    width = gate.width[:, None]
    densities = (torch.exp(-(z**2) / (2 * width**2)) / (2 * math.pi * width**2).sqrt()).prod(4)
    # the offset is a distance in the tokens' own units, as in the authors' code
    weights = densities / densities.sum(3, keepdim=True).clamp(min=1e-8)
    torch.testing.assert_close(gate(x, GRID).x, x * weights.flatten(2), rtol=1e-5, atol=1e-12)


def test_context_broadcasting_halves_the_deviations_and_keeps_the_mean():
    gate, x = made(ContextBroadcasting), tokens()
    y, mean = gate(x, GRID).x, x.mean(1, keepdim=True)
    torch.testing.assert_close(y.mean(1, keepdim=True), mean)
    torch.testing.assert_close(y - mean, (x - mean) / 2)
    scaled = ContextBroadcasting(site(), scaled=True).double()
    assert torch.equal(scaled(x, GRID).x, x)
    nn.init.ones_(scaled.weight)
    torch.testing.assert_close(scaled(x, GRID).x, x + mean)


@pytest.mark.parametrize("gate", [ECA, SqueezeExcitation, CBAM, PKCAM])
def test_channels_of_prefix_tokens_are_weighted_too_but_do_not_count(gate):
    module, x = made(gate), tokens()
    first = torch.randn(2, 1, 32).double()
    y = module(torch.cat([first, x], dim=1), GRID._replace(prefix=1)).x
    torch.testing.assert_close(y[:, 1:], module(x, GRID).x)
    weights = y[:, 0] / first[:, 0]
    if gate is not CBAM:  # which weights places besides
        torch.testing.assert_close(weights, y[:, 1] / x[:, 0])
    assert not torch.equal(weights, torch.ones_like(weights))


@pytest.mark.parametrize("gate", [ELA, PolarizedParallel, PolarizedSequential, ULSAM])
def test_prefix_tokens_pass_what_weights_places(gate):
    module, x = made(gate), tokens()
    first = torch.randn(2, 2, 32).double()
    y = module(torch.cat([first, x], dim=1), GRID._replace(prefix=2)).x
    assert torch.equal(y[:, :2], first)
    torch.testing.assert_close(y[:, 2:], module(x, GRID).x)


REFUSED = [
    (ECA, {"kernel_size": 4}, r"eca: kernel_size must be odd and positive, got 4; set gate.kernel_size, or null"),
    (ECA, {"kernel_size": [3]}, r"kernel_size=\[3\] has no entry for stage 1; set gate.kernel_size to one value, or"),
    (StepNet, {"kernel_size": 2}, r"stepnet: kernel_size must be odd and positive, got 2; set gate.kernel_size"),
    (PKCAM, {"kernel_size": 0}, r"pkcam: kernel_size must be odd and positive, got 0"),
    (ELA, {"size": "M"}, r"ela: size must be one of T, B, S, L, got 'M'; set gate.size"),
    (ELA, {"norm_groups": 5}, r"ela: 32 channels are no multiple of the 5 groups of the norm; set gate.norm_groups"),
    (ELA, {"norm_groups": 0}, r"ela: norm_groups must be a whole number of at least 1, got 0; set gate.norm_groups"),
    (SqueezeExcitation, {"ratio": 0}, r"se: ratio must be a whole number of at least 1, got 0; set gate.ratio"),
    (CBAM, {"ratio": 1.5}, r"cbam: ratio must be a whole number of at least 1, got 1.5; set gate.ratio"),
    (CBAM, {"kernel_size": 2}, r"cbam: kernel_size must be odd and positive, got 2; set gate.kernel_size"),
    (PolarizedParallel, {"spatial": "code"}, r"psa: spatial must be paper or released, got 'code'; set gate.spatial"),
    (ULSAM, {"groups": 0}, r"ulsam: groups must be a whole number of at least 1, got 0; set gate.groups"),
    (ULSAM, {"groups": 5}, r"ulsam: 32 channels are no multiple of 5 groups; set gate.groups"),
    (GaussianAdaptive, {"heads": 5}, r"gaussian: 32 channels make no 5 heads of at least 2 channels; set gate.heads"),
    (GaussianAdaptive, {"heads": 32}, r"gaussian: 32 channels make no 32 heads of at least 2 channels"),
    (GaussianAdaptive, {"gaussians": -1}, r"gaussian: gaussians must be a whole number of at least 1, got -1"),
    (GaussianAdaptive, {"scale": "one"}, r"gaussian: scale must be size or released, got 'one'; set gate.scale"),
    (ContextBroadcasting, {"scaled": 1}, r"context_broadcasting: scaled must be true or false, got 1; set gate.scaled"),
]


@pytest.mark.parametrize(("gate", "options", "message"), REFUSED)
def test_wrong_options_are_refused(gate, options, message):
    with pytest.raises(ValueError, match=message):
        gate(site(stage=1), **options)


def test_channels_that_have_no_halves_are_refused():
    with pytest.raises(ValueError, match=r"psa: the channels must be even, at least 8, got 6; set gate=eca"):
        PolarizedSequential(site(6))
    with pytest.raises(ValueError, match=r"ela: size S has C / 8 groups, got 20 channels; set gate.size=B or T"):
        ELA(site(20), size="S", norm_groups=4)
