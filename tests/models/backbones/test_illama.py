"""iLLaMA: the authors' results with their weights, sizes, files in their names, and what sees what."""

import parity
import pytest
import reference
import torch
from torch import nn

from conf import families
from models import create_model
from models.checkpoints import convert, export

CASES = [name for name in reference.cases("model") if name.startswith("illama/")]
MILLIONS = {"tiny": 5.701096, "small": 22.018024, "base": 86.502376, "large": 310.445032}  # of the authors' code
SHORT = {"dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def settings(hparams: dict) -> dict:
    """Of a case, as our model takes them."""
    names = {"img_size": "image_size", "embed_dim": "dim"}
    given = {names.get(key, key): value for key, value in hparams.items()}
    return {key: given[key] for key in ("image_size", "patch_size", "num_classes", "dim", "depth", "num_heads")}


def test_the_cases_are_found():
    assert len(CASES) >= 2


@pytest.mark.parametrize("name", CASES)
def test_model(name):
    hparams = reference.info(name)["hparams"]
    given = settings(hparams)
    model = create_model("illama_tiny", **given, factor={"rho": hparams.get("soft_mask_rate", 0.0)})
    assert sum(p.numel() for p in model.parameters()) == reference.info(name)["num_params"]
    parity.check(name, model, lambda theirs: convert(theirs, "illama_tiny", **given), lambda model, x: model(x))


@pytest.mark.parametrize("size", MILLIONS)
def test_parameters_and_multiply_adds(size):
    row = families.models()[f"illama_{size}"]
    assert row["counted"]["parameters"] / 1e6 == pytest.approx(MILLIONS[size], rel=1e-12)
    assert row["counted"]["multiply_adds"] / 1e9 == pytest.approx(row["published"]["multiply_adds"], abs=0.05)


@pytest.mark.parametrize("image_size", [64, (32, 64)])
def test_a_round_trip_gives_the_same_bits(image_size):
    torch.manual_seed(0)
    given = SHORT | {"image_size": image_size}
    state = create_model("illama_tiny", **given).state_dict()
    file = export(state, "illama_tiny", **given)
    assert torch.equal(file["pos_embed"][:, -1], state["stem.position.table"][:, 0])
    assert torch.equal(file["pos_embed"][:, :-1], state["stem.position.table"][:, 1:])
    back = convert({"model": file}, "illama_tiny", **given)
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


def test_a_file_for_other_images_brings_its_class_token_along():
    torch.manual_seed(0)
    state = create_model("illama_tiny", image_size=64, **SHORT).state_dict()
    file = export(state, "illama_tiny", image_size=64, **SHORT)
    with pytest.warns(UserWarning, match="position"):
        found = convert(file, "illama_tiny", image_size=96, **SHORT)
    assert found["stem.position.table"].shape == (1, 37, 32)
    assert torch.equal(found["stem.position.table"][:, 0], state["stem.position.table"][:, 0])


def test_a_block_gives_a_token_the_values_of_those_before_it():
    """The keys of later ones are in the sum of the softmax still; the class token is given those of all."""
    torch.manual_seed(0)
    model = create_model("illama_tiny", image_size=64, **SHORT)
    block, (x, grid) = model.stages[1].blocks[0], model.stem(torch.randn(1, 3, 64, 64))
    weights = block.attn.attention_matrix(block.norm1(x), grid)
    assert (weights[0, :, 0] > 0).all() and not weights[0, :, 1:, 0].any()
    assert torch.equal(weights[0, 0, 1:, 1:] > 0, torch.ones(16, 16).tril() > 0)
    assert (weights[0, :, 1].sum(-1) < 1).all() and torch.allclose(weights[0, :, 0].sum(-1), torch.ones(2))
    assert not block.attn.row_stochastic


def test_its_blocks_are_those_of_llama():
    model = create_model("illama_tiny", image_size=32, **SHORT | {"dim": 384, "num_heads": 6})
    block = model.stages[1].blocks[0]
    assert {type(norm) for norm in (block.norm1, block.norm2, model.norm)} == {nn.RMSNorm}
    assert block.mlp.fc2.in_features == 1024 and all(layer.bias is None for layer in (block.mlp.fc1_g, block.mlp.fc2))
    assert (
        create_model("illama_tiny", image_size=32, activation="gelu", **SHORT).stages[1].blocks[0].mlp.fc1_g.bias
        is None
    )
    create_model("illama_tiny", image_size=32, activation="swiglu", **SHORT)
