"""Gated positional attention equals timm's with its weights; what its gate and its start do."""

import pytest
import torch
from timm.models.convit import GPSA
from torch import Tensor, nn

from models.attention import Grid, Mixer, Refused, Site, build
from models.attention.cores.gpsa import gpsa_attention
from models.attention.softmax import softmax_attention

MAP = Grid(5, 5)


def made(grid: Grid = MAP, heads: int = 4, **options) -> Mixer:
    return gpsa_attention(Site(36, heads, grid, 0, 0, 1, "vit"), qkv_bias=False, **options)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, MAP.tokens, 36)


@pytest.mark.parametrize("heads", [4, 6, 9])
def test_equals_timm(heads: int, x: Tensor) -> None:
    """Its start too, but for heads beyond the kernel and the bias that cancels."""
    theirs, ours = GPSA(36, num_heads=heads).eval(), made(heads=heads)
    theirs.local_init()
    kernel = int(heads**0.5) ** 2
    torch.testing.assert_close(ours.core.position.weight[:kernel], theirs.pos_proj.weight[:kernel])
    nn.init.normal_(theirs.gating_param)
    nn.init.normal_(theirs.pos_proj.weight)
    state = theirs.state_dict()
    own = {"core.gate": state["gating_param"], "core.position.weight": state["pos_proj.weight"]}
    own["qkv.weight"] = torch.cat([state["qk.weight"], state["v.weight"]])
    ours.load_state_dict(own | {key: state[key] for key in ("proj.weight", "proj.bias")})
    torch.testing.assert_close(ours(x, MAP).x, theirs(x))
    torch.testing.assert_close(ours.attention_matrix(x, MAP), theirs.get_attention(x))


@torch.no_grad()
def test_the_gate_chooses_content_or_position(x: Tensor) -> None:
    mixer, whole = made(), softmax_attention(Site(36, 4, MAP, 0, 0, 1, "vit"), qkv_bias=False)
    whole.load_state_dict({key: value for key, value in mixer.state_dict().items() if "core" not in key})
    mixer.core.gate.fill_(-40)
    torch.testing.assert_close(mixer(x, MAP).x, whole(x, MAP).x)
    mixer.core.gate.fill_(40)
    weights = mixer.attention_matrix(x, MAP)
    torch.testing.assert_close(weights, mixer.attention_matrix(torch.randn_like(x), MAP))
    torch.testing.assert_close(mixer.attend(weights, x, MAP), mixer(x, MAP).x)


@torch.no_grad()
def test_heads_start_as_the_taps_of_a_convolution(x: Tensor) -> None:
    """Nine heads look at the nine cells around a token, columns first."""
    mixer, grid = made(Grid(5, 7), heads=9, locality=8.0), Grid(5, 7)
    mixer.core.gate.fill_(40)
    weights = mixer.attention_matrix(torch.randn(1, 35, 36), grid)[0, :, 2 * 7 + 3].unflatten(-1, (5, 7))
    looks = [divmod(int(head.argmax()), 7) for head in weights]
    assert looks == [(2 + y, 3 + x) for x in (-1, 0, 1) for y in (-1, 0, 1)]
    assert weights.amax((1, 2)).min() > 0.9


@torch.no_grad()
def test_a_map_is_no_square(x: Tensor) -> None:
    """A turned map gives the turned result once x and y change places."""
    mixer, wide = made(), torch.randn(1, 28, 36)
    turned = wide.unflatten(1, (4, 7)).transpose(1, 2).flatten(1, 2)
    before = mixer(wide, Grid(4, 7)).x.unflatten(1, (4, 7)).transpose(1, 2).flatten(1, 2)
    mixer.core.position.weight.copy_(mixer.core.position.weight[:, [1, 0, 2]])
    torch.testing.assert_close(mixer(turned, Grid(7, 4)).x, before)


def test_class_tokens_and_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot take the 1 class token\(s\) in front of it; set model.class_token"):
        build(gpsa_attention, [Site(36, 4, Grid(5, 5, 1), 0, 0, 1, "vit")])
    with pytest.raises(Refused, match=r"GatedPositionalCore cannot work on keys that are not its queries"):
        made(layout=lambda site: type("Around", (type(made().layout),), {"keys": "surrounding"})())
    with pytest.raises(ValueError, match=r"gpsa: locality must be a number of at least 1e-06, got 0; set attention"):
        made(locality=0)
