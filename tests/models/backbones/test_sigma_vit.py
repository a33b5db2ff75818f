"""σReparam ViT: the authors' results with their weights, sizes, files in their names, and what stands in for it."""

import parity
import pytest
import reference
import torch
from torch import nn

from conf import families
from models import create_model
from models.checkpoints import convert, export
from models.checkpoints.names import sigma
from models.reparam import is_reparametrised

CASE = "sigma_reparam/sigma_vit__d96_depth3_64"
SIZES = {"image_size": 64, "num_classes": 10, "dim": 96, "depth": 3, "num_heads": 3}
SHORT = {"image_size": 32, "num_classes": 5, "dim": 32, "depth": 2, "num_heads": 2}
WIDTHS = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24)}
COPY = ".spectral_normed_weight.weight"


def test_model():
    model = create_model("sigma_vit_tiny", **SIZES)
    info = reference.info(CASE)
    assert sum(p.numel() for p in model.parameters()) == info["num_params"]
    parity.check(CASE, model, lambda theirs: convert(theirs, "sigma_vit_tiny", **SIZES), lambda model, x: model(x))
    file = export(model.state_dict(), "sigma_vit_tiny", **SIZES)
    assert {key: list(value.shape) for key, value in file.items()} == {key: s for key, (s, _) in info["state"].items()}


@pytest.mark.parametrize("size", WIDTHS)
def test_parameters(size):
    """Those of the ViT but for its norms, and a number for every layer."""
    (width, depth), row = WIDTHS[size], families.models()[f"sigma_vit_{size}"]
    layers = width * 3 * width + 3 * width + width * width + width + 8 * width * width + 5 * width
    ends = 768 * width + width + (1 + 197) * width + 1000 * (width + 1)
    assert row["counted"]["parameters"] == depth * (layers + 4) + ends + 2
    assert row["model"].get("own_reparam", {}).get("conv_gain") == (0.125 if size == "large" else None)


def test_a_round_trip_gives_the_same_bits_and_figures_for_logs():
    torch.manual_seed(0)
    state = create_model("sigma_vit_tiny", **SHORT).state_dict()
    file = export(state, "sigma_vit_tiny", **SHORT)
    for key in (key for key in file if key.endswith(COPY)):
        layer = key.removesuffix(COPY)
        assert torch.equal(file[key], file[f"{layer}.weight"])
        assert torch.equal(file[f"{layer}.effective_spectral_norm"], file[f"{layer}.sigma"])
        norm = torch.linalg.matrix_norm(file[key], 2)
        torch.testing.assert_close(file[f"{layer}.spectral_normed_weight.spectral_norm"], norm[None])
    back = convert({"model": file}, "sigma_vit_tiny", **SHORT)
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


def test_a_file_with_another_patch_or_a_wrong_copy_is_refused():
    state = create_model("sigma_vit_tiny", **SHORT).state_dict()
    file = export(state, "sigma_vit_tiny", **SHORT)
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight must have the shape .32, 3, 8, 8. in sigma_v"):
        convert(file, "sigma_vit_tiny", patch_size=8, **SHORT)
    file[f"head{COPY}"] = file[f"head{COPY}"] + 1
    with pytest.raises(ValueError, match=rf"the file has 'head{COPY}'"):
        convert(file, "sigma_vit_tiny", **SHORT)


def test_it_has_no_norms_and_another_reparam_takes_its_place():
    model = create_model("sigma_vit_tiny", **SHORT)
    assert is_reparametrised(model) and not [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    plain = create_model("sigma_vit_tiny", own_reparam=None, **SHORT)
    assert plain.state_dict().keys() == create_model("vit_tiny", **SHORT).state_dict().keys()
    shared = create_model("sigma_vit_tiny", reparam="mhe", **SHORT)
    assert "stem.patch_embed.proj.weight" in shared.state_dict() and is_reparametrised(shared)
    assert sigma.authors("sigma_vit_tiny").source == "apple/ml-sigma-reparam"


@pytest.mark.parametrize(("gain", "std"), [(1.0, 0.02), (0.125, 0.0025)])
def test_kernels_start_as_they_should(gain, std):
    torch.manual_seed(0)
    model = create_model("sigma_vit_tiny", own_reparam={"conv_gain": gain}, **SHORT | {"dim": 192, "num_heads": 3})
    kernel = model.stem.patch_embed.proj.weight
    assert kernel.std().item() == pytest.approx(std, rel=0.02)
