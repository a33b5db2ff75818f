"""Focal modulation: how far a token sees, what is left without gates, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from models.attention import Grid, Refused, Site, check
from models.attention.focal import FocalModulation

GRID = Grid(15, 17)
SITE = Site(8, 2, GRID, 0, 0, 1, "hierarchical")


def make(site=SITE, **options) -> FocalModulation:
    torch.manual_seed(0)
    return FocalModulation(site, **options).double()


def seen(mixer: FocalModulation) -> torch.Tensor:
    """The map of the tokens that the output at the centre depends on."""
    x = torch.randn(1, GRID.tokens, 8, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(mixer(x, GRID).x[0, GRID.tokens // 2].sum(), x)
    return found[0].abs().sum(-1).view(GRID.height, GRID.width) > 0


@pytest.mark.parametrize(("levels", "window"), [(2, 3), (3, 3), (1, 5)])
def test_without_the_global_gate_a_token_sees_what_its_kernels_reach(levels, window):
    mixer = make(focal_levels=levels, focal_window=window)
    with torch.no_grad():
        mixer.f.weight[-1], mixer.f.bias[-1] = 0, 0
    side = sum(window + 2 * level - 1 for level in range(levels)) + 1
    near = torch.zeros(GRID.height, GRID.width, dtype=torch.bool)
    rows, columns = (slice(n // 2 - side // 2, n // 2 + side // 2 + 1) for n in GRID[:2])
    near[rows, columns] = True
    assert torch.equal(seen(mixer), near)


def test_the_last_level_sees_the_whole_map():
    assert seen(make()).all()


def test_without_gates_queries_are_multiplied_by_a_constant():
    mixer, x = make(), torch.randn(2, GRID.tokens, 8, dtype=torch.float64)
    with torch.no_grad():
        mixer.f.weight[16:], mixer.f.bias[16:] = 0, 0
    q = F.linear(x, mixer.f.weight[:8], mixer.f.bias[:8])
    torch.testing.assert_close(mixer(x, GRID).x, mixer.proj(q * mixer.h.bias))


def test_the_sum_may_be_divided_by_its_levels():
    plain, divided, x = make(), make(normalize=True), torch.randn(2, GRID.tokens, 8, dtype=torch.float64)
    with torch.no_grad():
        divided.h.weight.mul_(3)
    torch.testing.assert_close(divided(x, GRID).x, plain(x, GRID).x)


def test_the_norm_stands_behind_the_product():
    mixer, x = make(post_norm=True), torch.randn(2, GRID.tokens, 8, dtype=torch.float64)
    with torch.no_grad():
        mixer.norm.weight.zero_(), mixer.norm.bias.normal_()
    torch.testing.assert_close(mixer(x, GRID).x, mixer.proj(mixer.norm.bias).expand(2, GRID.tokens, 8))


def test_options_may_be_given_per_stage():
    site = SITE._replace(stage=1)
    assert [c.kernel_size[0] for c in make(site, focal_levels=[2, 3], focal_window=[3, 9]).convs] == [9, 11, 13]
    with pytest.raises(Refused, match=r"focal_levels=\[2, 3\] has no entry for stage 2; set attention.focal_levels to"):
        make(SITE._replace(stage=2), focal_levels=[2, 3])


def test_kernels_larger_than_those_of_the_operation_run_in_pytorch():
    assert make(focal_levels=3).runs().fused and not make(focal_levels=4).runs().fused
    with pytest.raises(Refused, match=r"conv2d has no Triton kernel: the kernel goes up to 7x7 weights; set attention"):
        check(make(focal_window=9, backend="triton"), SITE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"focal_window": 4}, r"focal: focal_window must be odd and positive, got 4; set attention.focal_window to 3"),
        ({"focal_levels": 0}, r"focal: focal_levels must be a whole number of at least 1, got 0; set attention.focal"),
        ({"normalize": 1}, r"focal: normalize must be true or false, got 1; set attention.normalize"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(Refused, match=r"8 channels do not divide into 3 heads; change model.num_heads or model.dim"):
        make(SITE._replace(num_heads=3))
