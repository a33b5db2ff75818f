"""Models by name."""

import pytest
import torch

from conf import families
from models import create_model, list_attentions, list_models


def test_names():
    assert {"vit_tiny", "swin_tiny", "convnext_tiny", "coatnet_0", "coatnet_32px"} <= set(list_models())
    assert {"softmax", "biformer", "dual", "agent", "focused_linear", "moh"} <= set(list_attentions())


def test_a_model_with_another_attention_size_and_settings():
    model = create_model("vit_32px", attention="agent", image_size=(32, 64), num_classes=7, depth=2)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [type(block.attn.core).__name__ for block in blocks] == ["AgentCore", "AgentCore"]
    assert model(torch.randn(1, 3, 32, 64)).shape == (1, 7)


def test_a_model_brings_its_own_attention():
    first = create_model("swin_32px").stages[0].blocks[0].attn
    assert first.window is not None and first.core.bias is not None
    assert create_model("swin_32px", attention="softmax").stages[0].blocks[0].attn.window is None


def test_settings_of_a_part_are_changed_one_by_one():
    with torch.device("meta"):
        model = create_model("agent_swin_tiny", first={"agent_tokens": [9, 16, 25, 49]}, rest={"shift": False})
    first, rest = model.stages[2].blocks[0].attn, model.stages[3].blocks[0].attn
    assert first.core.agents == (5, 5) and first.core.dwc.kernel_size == (3, 3) and rest.window == (7, 7)


WITH_MAPS = [name for name in families.small() if name != "perceiver_32px"]  # whose tokens have no places


@pytest.mark.parametrize("name", WITH_MAPS)
def test_features_only_gives_the_maps_of_all_stages(name):
    model = create_model(name, features_only=True)
    maps = model(torch.randn(2, 3, 64, 96))
    expected = [(2, c, -(-64 // s), -(-96 // s)) for c, s in zip(model.channels, model.strides, strict=True)]
    assert [tuple(x.shape) for x in maps] == expected
    sum(x.sum() for x in maps).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None], "a parameter that no map depends on"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"name": "vit_tinny"}, r"there is no model 'vit_tinny'; did you mean 'vit_tiny'"),
        ({"name": "vit_32px", "attention": "agnt"}, r"there is no attention 'agnt'; did you mean 'agent'"),
        ({"name": "vit_32px", "detph": 2}, r"vit_32px has no setting 'detph'; did you mean 'depth'\? It has "),
        (
            {"name": "agent_swin_tiny", "first": {"agents": 9}},
            r"agent_swin_tiny: first has no setting 'agents'.* It has",
        ),
        ({"name": "vit_32px", "num_classes": -1}, r"num_classes: must be 0 \(no head\) or more, got -1"),
        ({"name": "vit_32px", "image_size": 0}, r"image_size: must be pixels, one positive number or two, got 0"),
        ({"name": "vit_32px", "image_size": "abc"}, r"image_size: must be pixels, .* got 'abc'"),
        ({"name": "vit_32px", "depth": 0}, r"ViT: depth must be a whole number of at least 1, got 0; set model.depth"),
        ({"name": "swin_32px", "patch_size": 0}, r"Swin: patch_size must be a whole number of at least 1, got 0"),
        ({"name": "convnext_32px", "head_dim": 0}, r"ConvNeXt: head_dim must be a whole number of at least 1, got 0"),
        ({"name": "coatnet_32px", "stem_dim": 0}, r"CoAtNet: stem_dim must be a whole number of at least 1, got 0"),
        ({"name": "vit_32px", "drop_path": 1.0}, r"drop_path: must be a probability in \[0, 1\), got 1.0"),
        ({"name": "vit_32px", "num_heads": 5}, r"96 channels do not divide into 5 heads; change model.num_heads"),
        ({"name": "vit_32px", "attention": "window", "class_token": True}, r"blocks 0-3 .*set model.class_token=false"),
    ],
)
def test_wrong_arguments_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        create_model(**arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"first": "inline"}, r"agent_swin_tiny: first must be a dict with settings of agent_tokens, .*, got 'inline'"),
        ({"agent_tokens": 4}, r"no setting 'agent_tokens'.* Give it as first=\{'agent_tokens': \.\.\.\}"),
        (
            {"attention": ["agent", "window"]},
            r"attention must be a name, got \['agent', 'window'\]; choose from additive",
        ),
        ({"blocks": 2}, r"blocks=2 is no list; give attention.blocks one entry per stage"),
        ({"blocks": [4]}, r"stage 1 .*blocks=\[4\] has no entry for stage 1"),
    ],
)
def test_wrong_parts_of_a_plan_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        create_model("agent_swin_tiny", **arguments)


def test_a_plan_for_other_stages_than_a_vit_has_is_refused():
    with pytest.raises(ValueError, match=r"blocks=\['all', 'all', 0, 0\] has 4 entries and a ViT one stage; give one"):
        create_model("vit_tiny", attention="plan/agent_swin_small")
