"""Single-head attention: what passes, what it is with all channels, and what is refused."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.attention import Grid, Refused, Site, build
from models.attention.moh import MoHAttention
from models.attention.single_head import SingleHeadAttention

GRID = Grid(5, 7)
SITE = Site(32, 4, GRID, 0, 0, 1, "hierarchical")


def make(site=SITE, **options) -> SingleHeadAttention:
    """In evaluation, with a last norm that lets through."""
    torch.manual_seed(0)
    mixer = SingleHeadAttention(site, **options).double().eval()
    with torch.no_grad():
        mixer.proj_norm.bn.weight.fill_(1)
    return mixer


def tokens() -> torch.Tensor:
    return torch.randn(2, GRID.tokens, 32, dtype=torch.float64)


def test_the_other_channels_pass_up_to_the_relu_and_the_projection():
    mixer, x = make(partial=12), tokens()
    with torch.no_grad():
        mixer.proj.weight.copy_(torch.eye(32))
    found = mixer(x, GRID).x
    torch.testing.assert_close(found[..., 12:], x[..., 12:].relu(), rtol=1e-4, atol=0)  # 1/sqrt(1 + eps) of the norm
    assert not torch.allclose(found[..., :12], x[..., :12].relu())


def test_with_all_channels_and_no_norm_it_is_softmax_attention_of_one_head():
    mixer, x = make(partial=32), tokens()
    mixer.norm, mixer.qkv_norm, mixer.proj_norm = nn.Identity(), nn.Identity(), nn.Identity()
    q, k, v = mixer.qkv(x).split([16, 16, 32], dim=-1)
    expected = (q @ k.mT / 4).softmax(-1) @ v
    torch.testing.assert_close(mixer(x, GRID).x, mixer.proj(F.relu(expected)))


def test_the_norm_is_over_the_whole_image():
    """One number for all tokens: a shift and a scale of all of them that attend change no output."""
    mixer, x = make(partial=12), tokens()
    moved = x.clone()
    moved[..., :12] = 3 * moved[..., :12] + 5
    torch.testing.assert_close(mixer(moved, GRID).x, mixer(x, GRID).x, rtol=1e-4, atol=1e-4)
    one = x.clone()
    one[:, 0, :12] += 5
    assert not torch.allclose(mixer(one, GRID).x[:, 1:], mixer(x, GRID).x[:, 1:], atol=1e-3)


@pytest.mark.parametrize(
    ("dim", "channels"), [(224, 48), (320, 68), (308, 66), (448, 96), (352, 75), (336, 72)], ids=str
)
def test_the_default_share_gives_the_channels_of_the_paper(dim, channels):
    assert make(SITE._replace(dim=dim)).partial == channels


def test_gates_of_heads_are_refused_with_the_reason():
    core = partial(MoHAttention, core=SingleHeadAttention, shared_heads=1, routed_heads=1)
    with pytest.raises(ValueError, match=r"moh cannot gate the heads of SingleHeadAttention: it has one head, beside"):
        build(core, [SITE])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"partial": 1.5},
            r"single_head: partial must be a share of the channels between 0 and 1, or a number of them",
        ),
        ({"partial": 0}, r"single_head: partial must be .*, got 0; set attention.partial, e.g. to 0.214"),
        ({"qk_dim": 0}, r"single_head: qk_dim must be a whole number of at least 1, got 0; set attention.qk_dim"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_more_channels_than_there_are_are_refused():
    with pytest.raises(Refused, match=r"partial=40 is more than the 32 channels; set attention.partial to a share"):
        make(partial=40)
