"""Dual attention: windows and channel groups in turn."""

import hydra
import pytest
import torch
from torch import Tensor, nn

from kernels.channel_attention import channel_weights
from models.attention import Grid, Refused, Site, check
from models.attention.dual import ChannelCore, Positioned, dual_attention
from models.attention.multihead import MultiHead
from models.attention.softmax import SoftmaxCore, softmax_attention
from models.factory import instantiate

CONF = "../../../conf"


def site(height: int, width: int, block: int = 0, dim: int = 32, heads: int = 2, prefix: int = 0) -> Site:
    return Site(dim, heads, Grid(height, width, prefix), 0, block, 4, "hierarchical")


def tokens(place: Site, batch: int = 2) -> Tensor:
    return torch.randn(batch, place.grid.tokens, place.dim, generator=torch.Generator().manual_seed(0))


def test_blocks_alternate() -> None:
    kinds = [type(dual_attention(site(8, 8, block), cpe_kernel=0).core) for block in range(4)]
    assert kinds == [SoftmaxCore, ChannelCore, SoftmaxCore, ChannelCore]


def test_a_window_as_large_as_the_map_is_softmax_attention() -> None:
    place = site(5, 9)
    module, plain = dual_attention(place, window=(5, 9), cpe_kernel=0), softmax_attention(place)
    plain.load_state_dict(module.state_dict())
    x = tokens(place)
    torch.testing.assert_close(module(x, place.grid).x, plain(x, place.grid).x)


def test_padded_tokens_take_part_as_bias() -> None:
    """The authors pad after the norm and mask nothing: a padded key is the bias of the projection."""
    place = site(5, 4)
    module, x = dual_attention(place, window=7, cpe_kernel=0), tokens(place)
    padded = torch.zeros(2, 7, 7, 32)
    padded[:, :5, :4] = x.view(2, 5, 4, 32)
    whole = softmax_attention(site(7, 7))
    whole.load_state_dict(module.state_dict())
    expected = whole(padded.flatten(1, 2), Grid(7, 7)).x.view(2, 7, 7, 32)[:, :5, :4].flatten(1, 2)
    torch.testing.assert_close(module(x, place.grid).x, expected)


def test_channel_attention_follows_a_permutation_of_the_tokens() -> None:
    place = site(6, 7, block=1)
    module, x = dual_attention(place, cpe_kernel=0), tokens(place)
    order = torch.randperm(42)
    torch.testing.assert_close(module(x[:, order], place.grid).x, module(x, place.grid).x[:, order])


def test_channel_attention_is_the_equation() -> None:
    place = site(4, 6, block=1)
    module, x = dual_attention(place, cpe_kernel=0), tokens(place)
    q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in module.qkv(x).chunk(3, dim=-1))
    weights = (k.mT @ v / 4).softmax(-1)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 16))
    expected = module.proj((weights @ q.mT).mT.transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x, place.grid).x, expected)


@pytest.mark.parametrize(("scale", "ratio"), [("head_dim", 8.0), ("tokens", 1.0)])
def test_spread_of_the_channel_logits_from_64_to_4096_tokens(scale: str, ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = []
    for count in (64, 4096):
        k, v = torch.randn(2, 1, 8, count, 32, generator=generator)
        spread.append(channel_weights(k, v, (32 if scale == "head_dim" else count) ** -0.5).log().std(-1).mean())
    assert spread[1] / spread[0] == pytest.approx(ratio, rel=0.1)


def test_the_sum_over_tokens_does_not_leave_the_range_of_float16() -> None:
    k = torch.full((1, 1, 4096, 16), 10.0, dtype=torch.float16)
    out = ChannelCore(16)(k, k, k, Grid(64, 64), Grid(64, 64))
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, k)


@pytest.mark.parametrize("block", [0, 1])
def test_position_encoding_in_front(block: int) -> None:
    place = site(8, 6, block)
    module, x = dual_attention(place), tokens(place)
    assert isinstance(module, Positioned)
    encoded = (
        x
        + nn.functional.conv2d(
            x.mT.reshape(2, 32, 8, 6), module.position.proj.weight, module.position.proj.bias, padding=1, groups=32
        )
        .flatten(2)
        .mT
    )
    torch.testing.assert_close(module(x, place.grid).x, module.mixer(encoded, place.grid).x)
    assert isinstance(dual_attention(place, cpe_kernel=0), MultiHead)


@pytest.mark.parametrize("block", [0, 1])
def test_gates_weight_the_heads(block: int) -> None:
    place = site(8, 9, block)
    module, x = dual_attention(place), tokens(place)
    ones = torch.ones(2, 72, 2)
    torch.testing.assert_close(module(x, place.grid, ones).x, module(x, place.grid).x)
    closed = ones.clone()
    closed[..., 0] = 0
    module(x, place.grid, closed).x.square().mean().backward()
    grad = module.mixer.proj.weight.grad
    assert grad[:, :16].abs().max() == 0 < grad[:, 16:].abs().max()


@pytest.mark.parametrize("block", [0, 1])
def test_any_map_any_precision_and_gradients(block: int) -> None:
    module = dual_attention(site(14, 14, block))
    for height, width in ((14, 14), (3, 11), (1, 1)):
        x = tokens(site(height, width))
        assert module(x, Grid(height, width)).x.shape == x.shape
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert module(x, Grid(height, width)).x.isfinite().all()
    module(tokens(site(3, 11)) * 1e4, Grid(3, 11)).x.square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.isfinite().all(), name
    module.zero_grad()
    module(tokens(site(3, 11)), Grid(3, 11)).x.square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_attention_matrix_of_the_windows() -> None:
    place = site(8, 6)
    module, x = dual_attention(place, window=4), tokens(place)
    matrix = module.attention_matrix(x, place.grid)
    assert matrix.shape == (2 * 4, 2, 16, 16)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(8, 2, 16))
    with pytest.raises(TypeError, match="attention_matrix: ChannelCore has no attention matrix"):
        dual_attention(site(8, 6, 1)).attention_matrix(x, place.grid)


@pytest.mark.parametrize("block", [0, 1])
def test_class_tokens_are_refused_in_every_block(block: int) -> None:
    place = site(8, 8, block, prefix=1)
    with pytest.raises(Refused, match=r"class token\(s\)"):
        check(dual_attention(place), place)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"window": 0},
            "dual: window must be a whole number of at least 1, or two, got 0; give the side",
        ),
        ({"cpe_kernel": 2}, "dual: cpe_kernel must be odd, got 2; give 3, or 0 for no position encoding"),
        ({"cpe_kernel": -1}, "dual: cpe_kernel must be odd, got -1"),
        ({"scale": "none"}, "dual: scale must be head_dim or tokens, got 'none'; set attention.scale"),
    ],
)
def test_meaningless_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dual_attention(site(8, 8), **options)


def test_heads_that_do_not_divide_the_channels() -> None:
    with pytest.raises(Refused, match="32 channels do not divide into 3 heads"):
        dual_attention(site(8, 8, heads=3))


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_the_configuration_serves_small_maps(heads: int) -> None:
    with hydra.initialize(CONF, version_base=None):
        attention = instantiate(hydra.compose("attention/dual").attention)
    for block in (0, 1):
        place = site(4, 4, block, heads=heads)
        assert attention(place)(tokens(place), place.grid).x.shape == (2, 16, 32)
