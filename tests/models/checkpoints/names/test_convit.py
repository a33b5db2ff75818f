"""ConViT in the authors' and timm's files: names both ways, queries and keys apart from values, biases that cancel."""

import warnings

import pytest
import timm
import torch

from models import create_model
from models.checkpoints import convert, export

SMALL = {"dim": 32, "num_heads": 4, "image_size": 64, "num_classes": 5}


@pytest.mark.parametrize("size", ["tiny", *(pytest.param(size, marks=pytest.mark.full) for size in ("small", "base"))])
def test_names_and_shapes_map_completely_and_back(size):
    with torch.device("meta"):
        theirs, model = timm.create_model(f"convit_{size}").state_dict(), create_model(f"convit_{size}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = convert(theirs, f"convit_{size}", num_classes=1000)
    model.load_state_dict(ours, assign=True)
    back = export(ours, f"convit_{size}")
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in theirs.items()}


def test_a_round_trip_gives_the_same_bits():
    torch.manual_seed(0)
    state = create_model("convit_tiny", **SMALL).state_dict()
    theirs = export(state, "convit_tiny", **SMALL)
    back = convert(theirs, "convit_tiny", **SMALL)
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())
    qkv = state["stages.2.blocks.0.attn.qkv.weight"]
    assert torch.equal(theirs["blocks.7.attn.qk.weight"], qkv[:64])
    assert torch.equal(theirs["blocks.7.attn.v.weight"], qkv[64:])
    assert torch.equal(theirs["blocks.10.attn.qkv.weight"], state["stages.3.blocks.0.attn.qkv.weight"])


@torch.no_grad()
def test_biases_of_positions_change_nothing():
    torch.manual_seed(0)
    theirs = timm.create_model("convit_tiny", embed_dim=8, img_size=64, num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    before = theirs(images)
    state = theirs.state_dict()
    for key in (key for key in state if key.endswith("pos_proj.bias")):
        state[key].fill_(3.0)
    torch.testing.assert_close(theirs(images), before)
    ours = convert(state, "convit_tiny", **SMALL)
    model = create_model("convit_tiny", **SMALL).eval()
    model.load_state_dict(ours)
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)
    written = export(ours, "convit_tiny", **SMALL)
    assert sorted(written) == sorted(state) and not written["blocks.3.attn.pos_proj.bias"].any()
