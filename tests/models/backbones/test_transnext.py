"""TransNeXt: the gated MLP, pretraining size, image sizes, weight decay; its mixture of heads; the authors' names."""

from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from models import create_model
from models.attention.aggregated import aggregated_attention
from models.attention.cosine import ContinuousPositionBias
from models.attention.head_router import HeadRouter
from models.backbones.transnext import TransNeXt
from models.checkpoints import convert, export
from models.layers.mlp import ConvGLU

SMALL = {"depths": [1, 1, 1, 1]}
# shared and routed heads of each stage in the authors' configurations
MOH = {
    "moh_transnext_small_75": ([3, 6, 3, 4], [0, 0, 6, 12]),
    "moh_transnext_small_80": ([3, 6, 3, 8], [0, 0, 6, 12]),
    "moh_transnext_base_50": ([2, 2, 2, 4], [2, 4, 6, 8]),
    "moh_transnext_base_75": ([4, 8, 4, 5], [0, 0, 8, 16]),
}
CASES = {
    "moh/transnext_micro": "transnext_micro",
    "moh/transnext_micro_AAAA_256px": "transnext_micro_aaaa",
    "moh/moh_transnext_small_75": "moh_transnext_small_75",
}


def images(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def small(**settings) -> nn.Module:
    torch.manual_seed(0)
    return create_model("transnext_32px", num_classes=5, **settings).eval()


def test_the_mlp_is_gated_by_a_convolution():
    mlp = ConvGLU(6, 16)
    assert mlp.fc1.weight.shape == (20, 6) and mlp.fc2.weight.shape == (6, 10)  # two thirds of 16, rounded down
    x_BCHW = torch.randn(2, 6, 4, 5)
    gate, value = F.conv2d(x_BCHW, mlp.fc1.weight[..., None, None], mlp.fc1.bias).chunk(2, dim=1)
    gated = F.gelu(F.conv2d(gate, mlp.conv.weight, mlp.conv.bias, padding=1, groups=10)) * value
    wanted = F.conv2d(gated, mlp.fc2.weight[..., None, None], mlp.fc2.bias)
    torch.testing.assert_close(mlp(x_BCHW.flatten(2).mT, (4, 5)), wanted.flatten(2).mT)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (48, 96), (40, 33)])
def test_the_same_weights_are_the_same_function_at_any_image_size(size):
    """Built for an image size, or meeting it in a forward pass; unless distances are to be measured in its maps."""
    trained = small()
    tuned = small(image_size=size)
    tuned.load_state_dict(trained.state_dict())
    torch.testing.assert_close(tuned(images(*size)), trained(images(*size)))
    other = small(image_size=size, pretrain_size=size)
    other.load_state_dict(trained.state_dict())
    assert not torch.allclose(other(images(*size)), trained(images(*size)), atol=1e-6)


@pytest.mark.parametrize("name", ["transnext_tiny", "moh_transnext_small_75"])
@pytest.mark.parametrize(("pretrain_size", "sides"), [(224, (56, 28, 14, 7)), (None, (64, 32, 16, 8))])
def test_distances_are_measured_in_the_maps_of_the_first_training(name, pretrain_size, sides):
    with torch.device("meta"):
        model = create_model(name, image_size=256, pretrain_size=pretrain_size, **SMALL)
    found = [m.pretrain_size for m in model.modules() if isinstance(m, ContinuousPositionBias)]
    assert found == [(side, side) for side in sides]


def test_the_size_of_the_first_training_is_given_once_and_in_pixels():
    with torch.device("meta"), pytest.raises(ValueError, match=r"pretrain_size: must be pixels, .*got 0"):
        create_model("transnext_tiny", pretrain_size=0, **SMALL)
    attention = partial(aggregated_attention, pretrain_size=7)
    text = (
        r"attention: distances are measured as model.pretrain_size says, got \(7, 7\) from the attention; "
        r"set attention.pretrain_size=null"
    )
    with torch.device("meta"), pytest.raises(ValueError, match=text):
        TransNeXt(attention, 224, 5, dims=[8, 16], depths=[1, 1], num_heads=[2, 2], mlp_ratios=[2, 2])


def test_a_fixed_pooled_map_costs_as_many_keys_at_any_size():
    model, keys = small(fixed_pool_size=2), []
    for stage in model.stages[:3]:
        stage.blocks[0].attn.reduce.register_forward_hook(lambda *args: keys.append(args[-1][1][:2]))
    with torch.no_grad():
        model(images(64, 96))
    assert keys == [(2, 2)] * 3


def test_what_decays_is_what_the_authors_let_decay():
    model = small()
    fixed = {name.partition("attn.")[2] for name in model.no_weight_decay()}
    last = {"core.query_embedding", "core.temperature", "core.bias.cpb_fc1.weight", "core.bias.cpb_fc2.weight"}
    assert fixed == {*last, "core.relative_pos_bias_local"}
    assert len(model.no_weight_decay()) == 3 * 5 + 4  # the last stage has no neighbours


@pytest.mark.parametrize("name", MOH)
def test_heads_of_each_stage(name):
    with torch.device("meta"):
        model = create_model(name, **SMALL)
    routers = [m for m in model.modules() if isinstance(m, HeadRouter)]
    assert ([m.shared for m in routers], [m.routed for m in routers]) == MOH[name]
    assert [m.num_heads for m in routers] == ([3, 6, 12, 24] if "small" in name else [4, 8, 16, 32])


def test_another_attention_takes_the_place_of_the_mixture():
    with torch.device("meta"):
        model = create_model("moh_transnext_small_75", attention="softmax", **SMALL)
    assert not [m for m in model.modules() if isinstance(m, HeadRouter)]


@pytest.mark.parametrize("case", CASES)
def test_the_authors_names_and_shapes_and_back(case):
    state = {name: tuple(shape) for name, (shape, _) in reference.info(case)["state"].items()}
    theirs = {name: torch.empty(shape, device="meta") for name, shape in state.items()}
    ours = convert(theirs, CASES[case])
    with torch.device("meta"):
        model = create_model(CASES[case])
    model.load_state_dict(ours, assign=True)
    assert {name: tuple(value.shape) for name, value in export(ours, CASES[case]).items()} == state


def test_values_survive_a_round_trip_through_the_authors_names():
    name, settings = "moh_transnext_small_75", {"dims": [24, 48, 96, 192], **SMALL, "num_classes": 5}
    ours = create_model(name, **settings).state_dict()
    theirs = export(ours, name, **settings)
    assert theirs["block4.0.attn.qkv.weight"].shape == (576, 192) and "block4.0.attn.wg_0.weight" in theirs
    query, others = theirs["block1.0.attn.q.weight"], theirs["block1.0.attn.kv.weight"]
    packed = ours["stages.0.blocks.0.attn.mixer.qkv.weight"]
    assert torch.equal(query, packed[:24]) and torch.equal(others, packed[24:])
    back = convert(theirs, name, **settings)
    assert back.keys() == ours.keys() and all(torch.equal(back[key], ours[key]) for key in ours)


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match=r"TransNeXt: .*differ in length, got .*'mlp_ratios': 1.*; give as many of"):
        create_model("transnext_tiny", mlp_ratios=[4])
