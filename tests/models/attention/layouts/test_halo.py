"""Halos against timm's module, windows and dense attention, and what a block sees."""

from functools import partial

import pytest
import torch
from timm.layers.halo_attn import HaloAttn

from models.attention import Grid, Refused, Site
from models.attention.biases.relative import relative
from models.attention.cores.halo import halo_attention
from models.attention.gated import GatedAttention
from models.attention.layouts.halo import Halo, halo
from models.attention.moh import MoHAttention
from models.attention.softmax import softmax_attention

MAP = Grid(8, 12)
SITE = Site(dim=32, num_heads=2, grid=MAP, stage=0, block=0, depth=2, kind="hierarchical")


def softmax_in(layout: Halo, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return softmax_attention(SITE, layout=lambda site: layout, **options)


@pytest.mark.parametrize("scaled", [False, True])
def test_equals_timm(scaled: bool) -> None:
    """With an output projection that changes nothing: output and gradients, tables included."""
    torch.manual_seed(0)
    theirs = HaloAttn(32, num_heads=2, block_size=4, halo_size=2, scale_pos_embed=scaled).double()
    ours = halo_attention(SITE, block=4, halo=2, scale_position=scaled, qkv_bias=False).double()
    q, kv = (conv.weight[:, :, 0, 0] for conv in (theirs.q, theirs.kv))
    k, v = kv.unflatten(0, (2, 2, 16)).unbind(1)
    position = {f"core.position.{axis}": getattr(theirs.pos_embed, f"{axis}_rel") for axis in ("height", "width")}
    state = {"qkv.weight": torch.cat([q, k.flatten(0, 1), v.flatten(0, 1)]), **position}
    ours.load_state_dict(state | {"proj.weight": torch.eye(32), "proj.bias": torch.zeros(32)})
    x = torch.randn(2, MAP.tokens, 32, dtype=torch.double, requires_grad=True)
    output, expected = ours(x, MAP).x, theirs(x.mT.unflatten(2, MAP[:2])).flatten(2).mT
    torch.testing.assert_close(output, expected)
    tables = [ours.core.position.height, ours.core.position.width]
    grads = torch.autograd.grad(output.square().sum(), [x, *tables])
    wanted = torch.autograd.grad(expected.square().sum(), [x, theirs.pos_embed.height_rel, theirs.pos_embed.width_rel])
    for ours_, theirs_ in zip(grads, wanted, strict=True):
        torch.testing.assert_close(ours_, theirs_)
    assert not grads[1][:4].any() and grads[1][4:].abs().sum(1).all()  # rows below 2·halo are of no pair


def test_without_halo_it_is_windows() -> None:
    ours, theirs = softmax_in(Halo((4, 4), 0)), softmax_attention(SITE, window=4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, MAP.tokens, 32)
    torch.testing.assert_close(ours(x, MAP).x, theirs(x, MAP).x)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_a_masked_halo_as_large_as_the_map_is_dense_attention(biased: bool) -> None:
    """The bias sees the same offsets from every block."""
    bias = {"bias": relative} if biased else {}
    ours, theirs = softmax_in(Halo((4, 5), 12, masks=True), **bias), softmax_attention(SITE, **bias)
    ours.load_state_dict(theirs.state_dict() | {f"core.{n}": p for n, p in ours.core.named_parameters()})
    if biased:  # the table of the block and its halo is larger: the offsets of the map are in its middle
        with torch.no_grad():
            inner = ours.core.bias.table.unflatten(0, [2 * side - 1 for side in ours.core.bias.window])
            h, w = ours.core.bias.window
            inner[h - 8 : h + 7, w - 12 : w + 11] = theirs.core.bias.table.view(15, 23, 2)
    x = torch.randn(2, MAP.tokens, 32)
    torch.testing.assert_close(ours(x, MAP).x, theirs(x, MAP).x, rtol=1e-4, atol=1e-5)


def test_a_block_sees_the_halo_around_it() -> None:
    mixer = halo_attention(SITE, block=4, halo=1)
    x = torch.randn(1, MAP.tokens, 32, requires_grad=True)
    mixer(x, MAP).x[0, 5 * 12 + 5].sum().backward()
    seen = x.grad.abs().sum(-1).view(8, 12) > 0
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[3:9, 3:9] = True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_any_map_and_no_sample_meets_another(masked: bool) -> None:
    mixer = halo_attention(SITE, block=4, halo=3, mask_padding=masked)
    grid = Grid(7, 10)
    x = torch.randn(3, grid.tokens, 32)
    output = mixer(x, grid).x
    torch.testing.assert_close(mixer(x[1:2], grid).x, output[1:2])
    weights = mixer.attention_matrix(x, grid)
    assert weights.shape == (3 * 2 * 3, 2, 16, 100)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    torch.testing.assert_close(mixer.attend(weights, x, grid), output)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"halo: halo must be a whole number of at least 0, got -1"):
        halo(SITE, halo=-1)
    with pytest.raises(Refused, match=r"made for its own layout; leave out attention/layout"):
        halo_attention(SITE, layout=halo)
    with pytest.raises(Refused, match=r"two layouts"):
        halo_attention(SITE, window=4)


@pytest.mark.parametrize("masked", [False, True])
def test_where_the_map_is_halved_every_other_row_and_column_asks(masked: bool) -> None:
    """As timm's strided module on whole blocks; a map that they do not fill is rounded up."""
    torch.manual_seed(0)
    theirs = HaloAttn(32, num_heads=2, block_size=4, halo_size=2, stride=2).double()
    options = {"block": 4, "halo": 2, "qkv_bias": False, "output_projection": False, "mask_padding": masked}
    ours = halo_attention(SITE._replace(stride=2), **options).double()
    q, kv = (conv.weight[:, :, 0, 0] for conv in (theirs.q, theirs.kv))
    k, v = kv.unflatten(0, (2, 2, 16)).unbind(1)
    position = {f"core.position.{axis}": getattr(theirs.pos_embed, f"{axis}_rel") for axis in ("height", "width")}
    ours.load_state_dict({"qkv.weight": torch.cat([q, k.flatten(0, 1), v.flatten(0, 1)]), **position})
    x = torch.randn(2, MAP.tokens, 32, dtype=torch.double)
    output, expected = ours(x, MAP).x.unflatten(1, (4, 6)), theirs(x.mT.unflatten(2, MAP[:2])).permute(0, 2, 3, 1)
    assert ours.strided and not ours.has_matrix
    if masked:  # queries whose windows lie on the map; there are none with blocks of 4 in rows of 8
        assert not torch.allclose(output, expected)
    else:
        torch.testing.assert_close(output, expected)
    assert ours(x[:, : 7 * 9], Grid(7, 9)).x.shape == (2, 4 * 5, 32)
    with pytest.raises(TypeError, match=r"MultiHead has no attention matrix: it has fewer queries than tokens"):
        ours.attention_matrix(x, MAP)


def test_blocks_of_odd_sides_and_gated_heads_keep_the_map() -> None:
    halved = SITE._replace(stride=2)
    assert not halo_attention(halved, block=3).strided
    for wrapper in (GatedAttention, partial(MoHAttention, shared_heads=2, routed_heads=0)):
        mixer = wrapper(halved, core=partial(halo_attention, block=4, halo=1))
        assert not mixer.strided and mixer(torch.randn(1, MAP.tokens, 32), MAP).x.shape == (1, MAP.tokens, 32)
