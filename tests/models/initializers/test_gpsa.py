"""The convolutional start: values are the tokens, heads look at the cells of a kernel."""

from functools import partial

import pytest
import torch

from models.attention import Grid, Site
from models.attention.softmax import softmax_attention
from models.backbones.vit import ViT
from models.initializers.gpsa import gpsa


class Net(torch.nn.Module):
    def __init__(self, num_heads=4):
        super().__init__()
        site = Site(8 * num_heads, num_heads, Grid(7, 7), 0, 0, 1, "vit")
        self.attn = softmax_attention(site, window=7, relative_position_bias=True)


@pytest.mark.parametrize("num_heads", [4, 9])
def test_heads_look_at_the_cells_of_a_kernel(num_heads):
    net, side = Net(num_heads), int(num_heads**0.5)
    gpsa(net, locality=20.0)
    inner = 8 * num_heads
    assert torch.equal(net.attn.qkv.weight[2 * inner :], torch.eye(inner))
    matrix = net.attn.attention_matrix(torch.zeros(1, 49, inner), Grid(7, 7))[0]
    centre = 3 * 7 + 3
    for head in range(num_heads):
        row, column = head % side - (side - 1) / 2, head // side - (side - 1) / 2
        seen = {divmod(key, 7) for key in matrix[head, centre].topk(4 if side % 2 == 0 else 1).indices.tolist()}
        mean = [sum(cell[axis] for cell in seen) / len(seen) - 3 for axis in (0, 1)]
        assert mean == pytest.approx([row, column])  # an even kernel lies between the cells


def test_heads_beyond_a_square_stay():
    net, other = Net(5), Net(5)
    other.load_state_dict(net.state_dict())
    gpsa(net)
    assert torch.equal(net.attn.core.bias.table[:, 4], other.attn.core.bias.table[:, 4])
    assert not torch.equal(net.attn.core.bias.table[:, 3], other.attn.core.bias.table[:, 3])


def test_without_a_table_only_the_values_start_so():
    sizes = {"patch_size": 4, "dim": 16, "depth": 1, "num_heads": 2}
    torch.manual_seed(0)
    plain = ViT(softmax_attention, 16, 5, **sizes).state_dict()
    torch.manual_seed(0)
    model = ViT(softmax_attention, 16, 5, initializer=gpsa, **sizes).state_dict()
    changed = [name for name in model if not torch.equal(model[name], plain[name])]
    assert changed == ["stages.2.blocks.0.attn.qkv.weight"]
    with pytest.raises(ValueError, match=r"gpsa: values start as the tokens, .*, got 8 and 16 in stages"):
        ViT(partial(softmax_attention, head_dim=4), 16, 5, initializer=gpsa, **sizes)


@pytest.mark.parametrize("locality", [0, -1, "x", True])
def test_a_locality_that_is_none_is_refused(locality):
    with pytest.raises(ValueError, match=r"gpsa: locality must be a number above 0, got .*; set initializer.locality"):
        gpsa(Net(), locality=locality)


def test_a_flag_that_is_none_is_refused():
    with pytest.raises(
        ValueError, match=r"gpsa: only_gated must be true or false, got 'yes'; set initializer.only_gated"
    ):
        gpsa(Net(), only_gated="yes")
