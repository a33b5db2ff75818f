"""CoAtNet: sizes of the paper, where attention goes, running statistics under gradient checkpointing."""

import pytest
import torch

from models import create_model
from models.attention import Grid
from models.attention.softmax import softmax_attention
from models.backbones.coatnet import CoAtNet
from models.layers.block import Block
from models.layers.mbconv import MBConvBlock

small = {"stem_dim": 8, "dims": (8, 16, 24), "depths": (2, 1, 2), "strides": (2, 2, 1), "head_dim": 8}


@pytest.mark.parametrize(("name", "millions"), [("coatnet_0", 25), ("coatnet_1", 42)])
def test_parameters_are_those_of_the_paper(name, millions):
    with torch.device("meta"):
        model = create_model(name)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(count / millions - 1) < 0.05  # table 4 of the paper; ours: 25.5 and 42.6


def test_sites_are_those_of_the_attention_stages(recorder):
    model = CoAtNet(recorder, (36, 64), 5, attention_stages=(2, 1), **small)
    assert [(s.dim, s.num_heads, s.grid, s.stage, s.block, s.depth, s.kind) for s in recorder.sites] == [
        (16, 2, Grid(5, 8), 1, 0, 1, "hybrid"),
        (24, 3, Grid(5, 8), 2, 0, 2, "hybrid"),
        (24, 3, Grid(5, 8), 2, 1, 2, "hybrid"),
    ]
    assert model.strides == [4, 8, 8]
    assert [type(stage.blocks[0]) for stage in model.stages] == [MBConvBlock, Block, Block]


def test_any_stage_can_have_attention(recorder):
    model = CoAtNet(recorder, 32, 5, attention_stages=(0,), **small)
    assert [site.stage for site in recorder.sites] == [0, 0]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_a_list_gives_each_stage_its_own(recorder):
    CoAtNet([None, recorder, softmax_attention], 32, 5, attention_stages=(1, 2), **small)
    assert [site.stage for site in recorder.sites] == [1]
    CoAtNet([recorder, None, None], 32, 5, attention_stages=(0,), **small)
    assert [site.stage for site in recorder.sites] == [1, 0, 0]


def test_checkpointing_counts_every_batch_once(recorder):
    torch.manual_seed(0)
    model = CoAtNet(recorder, 32, 5, attention_stages=(1, 2), **small).train()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, after = torch.randn(4, 3, 32, 32), []
    for enabled in (False, True):
        model.load_state_dict(start)
        model.set_gradient_checkpointing(enabled)
        model(images).sum().backward()
        after.append({name: buffer.clone() for name, buffer in model.named_buffers()})
    assert any("running_mean" in name and (after[0][name] != start[name]).any() for name in after[0])
    for name, buffer in after[0].items():
        assert torch.equal(buffer, after[1][name]), name
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_lists_of_unequal_length_are_refused(recorder):
    with pytest.raises(ValueError, match=r"CoAtNet: .*differ in length, got .*'strides': 2"):
        CoAtNet(recorder, 32, 5, **{**small, "strides": (2, 2)})


def test_strides_other_than_one_and_two_are_refused(recorder):
    with pytest.raises(ValueError, match=r"CoAtNet: strides must be 1 or 2, got \[2, 4, 2\]; set model.strides"):
        CoAtNet(recorder, 32, 5, **{**small, "strides": (2, 4, 2)})


def test_attention_stages_must_exist(recorder):
    with pytest.raises(ValueError, match=r"CoAtNet: attention_stages must name .* 0 to 2, got \[3\]"):
        CoAtNet(recorder, 32, 5, attention_stages=(3,), **small)
