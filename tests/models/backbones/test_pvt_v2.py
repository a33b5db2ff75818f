"""PVT v2: equal to timm's with the same weights; the sizes of the paper; norms at the end of stages."""

from types import SimpleNamespace

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from conf import families
from models import create_model

# parameters of timm's models, and billions of multiply-adds at 224 pixels in table 3 of the paper
SIZES = {
    "pvt_v2_b0": (3_666_760, 0.6),
    "pvt_v2_b1": (14_009_000, 2.1),
    "pvt_v2_b2": (25_362_856, 4.0),
    "pvt_v2_b3": (45_238_696, 6.9),
    "pvt_v2_b4": (62_556_072, 10.1),
    "pvt_v2_b5": (81_956_008, 11.8),
}
RULES = [
    (r"^patch_embed\.", "stem.patch_embed."),
    (r"\.downsample\.proj\.", ".downsample.conv."),
    (r"\.downsample\.norm\.", ".downsample.out_norm."),
    (r"\.attn\.sr\.", ".attn.reduce.conv."),
    (r"\.attn\.norm\.", ".attn.reduce.norm."),
    (r"\.dwconv\.", ".conv."),
]


class Packed(nn.Module):
    """timm's model, with the weights of queries, keys and values next to each other under one name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def state_dict(self) -> dict[str, Tensor]:
        return packed(self.model.state_dict())

    def named_parameters(self) -> list[tuple[str, SimpleNamespace]]:
        gradients = packed({name: p.grad for name, p in self.model.named_parameters()})
        return [(name, SimpleNamespace(grad=grad)) for name, grad in gradients.items()]

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())


def packed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for name, tensor in state.items():
        if ".attn.q." in name:
            result[name.replace(".q.", ".qkv.")] = torch.cat([tensor, state[name.replace(".q.", ".kv.")]])
        elif ".attn.kv." not in name:
            result[name] = tensor
    return result


def both(name: str, **settings) -> tuple[nn.Module, Packed]:
    return create_model(name, **settings), Packed(timm.create_model(name, **settings))


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_multiply_adds(name):
    """As recorded, which tests/models/test_tables.py counts."""
    counted, (count, billions) = families.models()[name]["counted"], SIZES[name]
    assert counted["parameters"] == count
    # B5 has 11.72 G, of which the paper says 11.8
    assert counted["multiply_adds"] / 1e9 == pytest.approx(billions, abs=0.05, rel=0.01)


@pytest.mark.parametrize(
    ("name", "size"),
    [("pvt_v2_b0", (64, 64)), ("pvt_v2_b0", (96, 160)), ("pvt_v2_b1", (64, 64)), ("pvt_v2_b5", (64, 64))],
)
def test_equals_timm(assert_same, name, size):
    """The sizes differ in width (B0), in the ratios of the MLPs (B5), and in depth; maps that 8 divides."""
    assert_same(*both(name, depths=[1, 1, 2, 1], num_classes=5), RULES, size)


def test_equals_timm_on_odd_images(assert_same):
    """Embeddings overlap beyond the edge; keys of full length, since timm drops what the ratio does not divide."""
    ours = create_model("pvt_v2_b0", attention="softmax", depths=[1, 1, 1, 1], num_classes=5)
    theirs = Packed(timm.create_model("pvt_v2_b0", sr_ratios=[1, 1, 1, 1], depths=[1, 1, 1, 1], num_classes=5))
    assert_same(ours, theirs, RULES, (50, 75))


def test_the_norm_of_a_stage_is_part_of_every_pyramid():
    torch.manual_seed(0)
    images = torch.randn(1, 3, 32, 64)
    for maps in (
        create_model("pvt_v2_32px").eval().forward_pyramid(images),
        create_model("pvt_v2_32px", features_only=True).eval()(images),
    ):
        for feature in maps:
            torch.testing.assert_close(feature.mean(1), torch.zeros(1, *feature.shape[2:]), rtol=0, atol=1e-5)
            torch.testing.assert_close(
                feature.var(1, correction=0), torch.ones(1, *feature.shape[2:]), rtol=0, atol=1e-2
            )


def test_layer_decay_counts_the_norm_of_a_stage_to_its_last_block():
    model = create_model("pvt_v2_32px")
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    for s, stage in enumerate(model.stages):
        last = f"stages.{s}.blocks.{len(stage.blocks) - 1}.norm1.weight"
        assert groups[f"stages.{s}.norm.weight"] == groups[f"stages.{s}.norm.bias"] == groups[last]


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match=r"PVTv2: .*differ in length, got .*'mlp_ratios': 1.*; give as many of each"):
        create_model("pvt_v2_b0", mlp_ratios=[4])
