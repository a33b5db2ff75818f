"""Weights of a softmax model start the same backbone with any other mechanism: what fits is kept, the new is said."""

import pytest
import torch

from models import create_model, list_attentions
from models.attention import mixers_of
from models.surgery.transplant import transplanted

OTHERS = (
    "conv",
    "axial",
    "relational",
    "single_head",
    "dynamic_conv",
    "light_conv",
    "lambda_conv",
    "nin_gate",
    "hyper_kernel",
)  # without one projection of all heads to queries, keys and values
SMALL = {"dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5, "class_token": False}


def trained(**chosen):
    torch.manual_seed(1)
    return create_model("vit_32px", **SMALL | chosen)


@pytest.mark.parametrize("name", list_attentions())
def test_softmax_weights_start_every_mechanism(name):
    source = trained().state_dict()
    torch.manual_seed(2)
    model = create_model("vit_32px", name, **SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = transplanted(source, model)
    model.load_state_dict(found.weights)
    after = model.state_dict()
    outside = [key for key in after if not any(key.startswith(f"{mixer}.") for mixer, _ in mixers_of(model))]
    assert outside and all(torch.equal(after[key], source[key]) for key in outside)
    ends = (".proj.weight", ".qkv.weight")
    projections = [key for key in after if ".attn." in key and key.endswith(ends) and key not in found.new]
    assert (projections or name in OTHERS) and set(projections) <= set(found.kept)
    for key in projections:
        assert torch.equal(after[key], source[key.replace(".mixer.", ".")])
    silent = [module.router for module in model.modules() if hasattr(module, "router")]
    assert silent or all(torch.equal(after[key], before[key]) for key in found.new)
    assert all(key.rpartition(".attn.")[2] in str(found) for key in found.new)


def test_parts_keep_all_and_name_the_table():
    found = transplanted(trained(layout="window", bias="relative").state_dict(), trained(layout="grid"))
    assert not found.new and {key.rpartition(".")[2] for key in found.dropped} == {"table"}
    assert str(found).endswith("dropped  1,352 parameters: core.bias.table (2)") and len(found.kept) == len(
        found.weights
    )


def test_other_depths_and_widths_are_not_taken():
    assert transplanted(trained(depth=3).state_dict(), trained(attention="agent")) is None
    assert transplanted(trained(depth=1).state_dict(), trained(attention="agent")) is None
    assert transplanted(trained(dim=64).state_dict(), trained(attention="agent")) is None


def test_a_pool_and_a_gate_are_new():
    found = transplanted(trained().state_dict(), trained(pool="simpool", gate="eca"))
    assert {key.partition(".")[0] for key in found.new} == {"pooling", "stages"} and not found.dropped
    assert all("gate" in key for key in found.new if key.startswith("stages"))
