"""The convolution of PatchConvNet: what a token sees, and what is refused; parity: tests/models/backbones."""

import pytest
import torch

from models.attention import Grid, Refused, Site, check
from models.attention.patch_conv import PatchConv

GRID = Grid(7, 9)
SITE = Site(16, 2, GRID, 0, 0, 1, "vit")


def make(site: Site = SITE, **options) -> PatchConv:
    torch.manual_seed(0)
    return PatchConv(site, **options).double()


def tokens() -> torch.Tensor:
    return torch.randn(2, GRID.tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def seen(mixer: PatchConv) -> torch.Tensor:
    """The map of the tokens that the output at the centre depends on."""
    x = tokens().requires_grad_()
    (found,) = torch.autograd.grad(mixer(x, GRID).x[0, GRID.tokens // 2].sum(), x)
    assert not found[1].any()
    return found[0].abs().sum(-1).view(GRID.height, GRID.width) > 0


def test_the_squeeze_sees_the_whole_map_and_the_convolution_its_kernel():
    mixer = make()
    assert seen(mixer).all()
    torch.nn.init.zeros_(mixer.se.fc2.weight)
    near = torch.zeros(GRID.height, GRID.width, dtype=torch.bool)
    near[2:5, 3:6] = True
    assert torch.equal(seen(mixer), near)


def test_a_squeeze_that_is_shut_leaves_the_bias_alone():
    mixer = make()
    with torch.no_grad():
        mixer.se.fc2.weight.zero_(), mixer.se.fc2.bias.fill_(-100)
    torch.testing.assert_close(mixer(tokens(), GRID).x, mixer.proj.bias.expand(2, GRID.tokens, 16))


def test_the_squeeze_has_a_share_of_the_channels():
    assert make().se.fc1.out_channels == 4 and make(squeeze=0.01).se.fc1.out_channels == 1


def test_a_kernel_larger_than_those_of_the_operation_runs_in_pytorch():
    assert make().runs().fused and not make(kernel_size=9).runs().fused
    with pytest.raises(Refused, match=r"conv2d has no Triton kernel: the kernel goes up to 7x7 weights; set attention"):
        check(make(kernel_size=9, backend="triton"), SITE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kernel_size": 4},
            r"patch_conv: kernel_size must be odd and positive, got 4; set attention.kernel",
        ),
        ({"squeeze": 0}, r"patch_conv: squeeze must be a share of the channels above 0 and at most 1, got 0; set att"),
        ({"squeeze": 2}, r"patch_conv: squeeze must be a share of the channels above 0 and at most 1, got 2; set att"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(Refused, match=r"16 channels do not divide into 3 heads; change model.num_heads or model.dim"):
        make(SITE._replace(num_heads=3))
