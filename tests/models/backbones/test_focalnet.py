"""FocalNet: equal to timm's with norms in both places, in its names and the authors', and the sites it offers."""

from functools import partial

import pytest
import torch
from timm.layers import LayerNorm2d
from timm.models import focalnet as timms

from conf import families
from models import create_model
from models.attention import Grid
from models.backbones.focalnet import FocalNet
from models.checkpoints import convert, export
from tests.models.backbones import oracle

SMALL = {"dims": [16, 32, 64, 128], "depths": [1, 1, 2, 1], "num_heads": [2, 2, 4, 8]}
small = partial(timms.FocalNet, embed_dim=16, depths=(1, 1, 2, 1))
BEHIND = {"use_post_norm": True, "use_overlap_down": True, "layerscale_value": 1e-4}
FL3, FL4 = ({"focal_levels": (levels,) * 4} for levels in (3, 4))
SIZES = {
    "focalnet_tiny_srf": {},
    "focalnet_tiny_lrf": FL3,
    "focalnet_large_fl3": {**FL3, **BEHIND, "focal_windows": (5,) * 4},
    "focalnet_large_fl4": {**FL4, **BEHIND, "normalize_modulator": True},  # timm's own leaves that out
    "focalnet_huge_fl3": {**FL3, **BEHIND, "use_post_norm_in_modulation": True},
}
TIMMS = ["tiny_srf", "tiny_lrf", "small_srf", "small_lrf", "base_srf", "base_lrf"]
TIMMS += [f"{size}_{levels}" for size in ("large", "xlarge", "huge") for levels in ("fl3", "fl4")]
QUICK = ("tiny_lrf", "huge_fl4")
LARGE = 20_842 * 1537  # weights of the other classes of ImageNet-22k, which FocalNet-L has in timm
COUNTS = {
    "focalnet_tiny_srf": (28_427_116, 4.403),
    "focalnet_tiny_lrf": (28_647_928, 4.475),
    "focalnet_small_srf": (49_891_216, 8.599),
    "focalnet_small_lrf": (50_342_440, 8.715),
    "focalnet_base_srf": (88_148_144, 15.241),
    "focalnet_base_lrf": (88_749_768, 15.397),
    "focalnet_large_fl3": (239_134_898 - LARGE, 104.9),
    "focalnet_large_fl4": (239_315_402 - LARGE, 105.0),
}
PAPER = {"focalnet_tiny_iso": 5.9, "focalnet_small_iso": 22.4, "focalnet_base_iso": 87.2, "focalnet_xlarge_fl3": 366}


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("focalnet_tiny_lrf", (96, 64)),
        ("focalnet_large_fl4", (64, 96)),
        pytest.param("focalnet_tiny_srf", None, marks=pytest.mark.full),
        pytest.param("focalnet_large_fl3", None, marks=pytest.mark.full),
        pytest.param("focalnet_huge_fl3", (96, 64), marks=pytest.mark.full),
    ],
)
def test_equals_timm(name, at):
    oracle.equal(name, small(**SIZES[name]), 64, at=at, **SMALL)


def test_one_stage_equals_timms():
    theirs = timms.FocalNet(embed_dim=32, depths=(2,), focal_levels=(3,), focal_windows=(3,))
    theirs.stem = timms.Downsample(3, 32, stride=16, norm_layer=partial(LayerNorm2d, eps=1e-5))
    oracle.equal("focalnet_tiny_iso", theirs, 64, at=(64, 96), dims=[32], depths=[2], num_heads=[2])


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_multiply_adds(name):
    """timm's, at the pixels of the row."""
    counted, (parameters, billions) = families.models()[name]["counted"], COUNTS[name]
    assert counted["parameters"] == parameters
    assert counted["multiply_adds"] / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("name", PAPER)
def test_parameters_of_the_paper(name):
    """In millions; timm has none of one stage, and the paper's XL is counted with 1000 classes."""
    assert families.models()[name]["counted"]["parameters"] / 1e6 == pytest.approx(PAPER[name], abs=0.1)


@pytest.mark.parametrize("size", [pytest.param(s, marks=[] if s in QUICK else pytest.mark.full) for s in TIMMS])
def test_every_size_has_timms_weights(size):
    with torch.device("meta"):
        state = getattr(timms, f"focalnet_{size}")(num_classes=7).state_dict()
        ours = create_model(f"focalnet_{size}", num_classes=7).state_dict()
    converted = convert(state, f"focalnet_{size}", num_classes=7)
    assert {key: value.shape for key, value in converted.items()} == {key: v.shape for key, v in ours.items()}


@pytest.mark.parametrize("name", ["focalnet_tiny_srf", "focalnet_huge_fl3"])
def test_files_of_the_authors_are_read_as_timm_reads_them(name):
    """timm renames the authors' weights when it loads them: what we write in their names is the same model there."""
    model, theirs = create_model(name, num_classes=5, **SMALL).eval(), small(num_classes=5, **SIZES[name]).eval()
    state = model.state_dict()
    file = export(state, name, **SMALL)
    of_theirs = {"patch_embed.proj.weight", "layers.0.downsample.norm.bias", "layers.2.blocks.1.modulation.f.bias"}
    assert of_theirs <= set(file)
    assert file["layers.0.blocks.0.modulation.h.weight"].shape == (16, 16, 1, 1)
    back = convert({"model": file}, name, **SMALL)
    assert all(torch.equal(back[key], value) for key, value in state.items()) and set(back) == set(state)
    theirs.load_state_dict(timms.checkpoint_filter_fn({"model": file}, theirs))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), theirs(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dims", "kind", "grids"), [([16, 32], "hierarchical", [(8, 6), (4, 3)]), ([16], "vit", [(8, 6)])]
)
def test_its_sites(recorder, dims, kind, grids):
    FocalNet(recorder, (32, 24), 5, dims=dims, depths=[1] * len(dims), num_heads=[2] * len(dims))
    assert [(site.dim, site.grid, site.kind) for site in recorder.sites] == [
        (dim, Grid(*grid), kind) for dim, grid in zip(dims, grids, strict=True)
    ]


def test_maps_that_do_not_divide_are_completed():
    model = create_model("focalnet_large_fl3", num_classes=5, image_size=64, **SMALL).eval()
    assert [tuple(feature.shape[2:]) for feature in model.forward_pyramid(torch.randn(1, 3, 33, 47))] == [
        (9, 12), (5, 6), (3, 3), (2, 2),
    ]  # fmt: skip


def test_wiring_in_parallel_is_refused_where_norms_stand_behind():
    with pytest.raises(ValueError, match=r"FocalNet: the norms of its blocks stand behind the branches, got wiring="):
        create_model("focalnet_large_fl3", wiring="parallel", **SMALL)
