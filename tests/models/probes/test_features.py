"""Maps in colours, features on a plane, vectors in files."""

import csv
import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conf.errors import UserError
from data.module import ImageData
from data.sources.digits import Digits
from models import create_model
from models.attention import mixers_of
from models.attention.recording import recorded
from models.probes.features import features, nearest_of_class, plane_of
from models.probes.reading.principal import colours, components, painted
from models.probes.reading.queries_keys import in_one_space, queries_keys


@pytest.fixture
def trainer() -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return ImageData(Digits(), 10, 32, batch_size=16, workers=0)


def test_main_directions_are_found_in_their_order():
    parts_HW = torch.randn(4, 6, 6, dtype=torch.float64)
    parts_HW = torch.linalg.qr((parts_HW - parts_HW.mean((1, 2), keepdim=True)).flatten(1).T).Q.T.view(4, 6, 6)
    sizes = torch.tensor([4.0, 3, 2, 1])
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q[:4]
    map_BCHW = torch.einsum("khw,k,kc->chw", parts_HW, sizes.double(), turn)[None] + 7
    found = components(map_BCHW)
    assert found.shares == pytest.approx((sizes.square() / 30)[:3].tolist())
    for k in range(3):
        expected = parts_HW[k] * sizes[k]
        torch.testing.assert_close(found.coordinates[0, ..., k].abs(), expected.abs(), rtol=1e-9, atol=1e-9)
        assert found.coordinates[..., k].max() == found.coordinates[..., k].abs().max()
    shades = colours(found.coordinates)
    assert shades.min() == 0 and shades.max() == 1


@pytest.mark.parametrize("shape", [(1, 2, 3, 3), (1, 5, 1, 1), (2, 4, 1, 1)])
def test_maps_with_few_channels_or_tokens(shape):
    found = components(torch.randn(shape))
    assert found.coordinates.isfinite().all() and len(found.shares) == 3 and found.coordinates[..., 2].abs().max() < 9
    assert painted(Image.new("RGB", (32, 24)), colours(found.coordinates)[0]).size == (320, 240)


def test_queries_and_keys_share_a_space_that_softmax_does_not_notice():
    q, k = torch.randn(2, 7, 5, dtype=torch.float64) * 9 + 3, torch.randn(2, 6, 5, dtype=torch.float64) - 8
    q1, k1 = in_one_space(q, k)
    torch.testing.assert_close((q1 @ k1.mT).softmax(-1), (q @ k.mT).softmax(-1))
    torch.testing.assert_close(q1.mean(1), k1.mean(1))
    spread = [(x - x.mean(1, keepdim=True)).norm(dim=-1).mean(1) for x in (q1, k1)]
    torch.testing.assert_close(*spread)


@pytest.mark.parametrize("settings", [{}, {"layout": "reduced"}, {"attention": "moh"}, {"transform": "rope"}])
def test_exported_keys_are_those_of_the_attention(settings):
    """softmax of the queries by the keys is the attention matrix, where this is what the core computes."""
    model = create_model("vit_32px", num_classes=2, **{"attention": "softmax"} | settings).eval()
    with torch.no_grad(), recorded(model) as calls:
        model(torch.randn(1, 3, 32, 32))
    name, mixer = next(mixers_of(model))
    q, k, kv_grid = queries_keys(mixer, *calls[name])
    assert k.shape[2] == kv_grid.tokens
    found = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)
    torch.testing.assert_close(found, mixer.attention_matrix(*calls[name]), rtol=1e-5, atol=1e-6)


def test_regions_share_the_projection_of_the_map():
    """BiFormer's last stage attends everywhere, so that its keys can be told from its matrix."""
    model = create_model("swin_32px", num_classes=2, attention="biformer").eval()
    with torch.no_grad(), recorded(model) as calls:
        model(torch.randn(1, 3, 32, 32))
    for name, mixer in mixers_of(model):
        q, k, _ = queries_keys(mixer, *calls[name])
        assert q.shape == k.shape and q.shape[1:3] == (mixer.site.num_heads, calls[name].grid.tokens)
    assert type(mixer).__name__ == "LePEAttention"
    found = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)
    torch.testing.assert_close(found, mixer.attention_matrix(*calls[name]), rtol=1e-5, atol=1e-6)


def test_classes_apart_stay_apart():
    centres = np.repeat(np.eye(3) * 50, 12, axis=0)
    x, labels = (
        (centres + np.random.default_rng(0).normal(size=centres.shape)).astype(np.float32),
        np.repeat([0, 1, 2], 12),
    )
    assert nearest_of_class(x, labels) == nearest_of_class(plane_of(x), labels) == 1.0
    assert np.array_equal(plane_of(x), plane_of(x))


def test_the_report_of_a_model(digits, trainer, tmp_path):
    model = create_model("swin_32px", num_classes=10).eval()
    report = features(model, digits, trainer, images=2, points=40, export=True, layers=[0, -1])
    assert [row["map"] for row in report.tables["maps"]] == [f"stage {i}" for i in range(len(model.stages))]
    assert set(report.pictures) == {"0", "359", "plane"} == set(report.captions)
    assert len(report.tables["plane"]) == 40 and 0 <= report.figures["nearest_of_class"] <= 1
    first, last = [name for name, _ in mixers_of(model)][:: len(list(mixers_of(model))) - 1]
    vectors = report.tensors["vectors"]
    assert set(vectors) == {f"{name}.{kind}" for name in (first, last) for kind in ("tokens", "queries", "keys")}
    index = report.tables["vectors"]
    of_keys = [row for row in index if row["layer"] == first and row["kind"] == "key"]
    assert len(of_keys) == vectors[f"{first}.keys"].shape[1] and of_keys[-1]["image"] == "359"
    assert [row["vector"] for row in of_keys] == list(range(len(of_keys)))
    save_file(vectors, tmp_path / "vectors.safetensors")
    json.dumps(report.figures)


def test_what_cannot_be_shown_is_said_before_work(digits):
    model = create_model("vit_32px", num_classes=10, depth=1, attention="conv")
    for given, said in (
        ({"maps": "first"}, "features: maps must be all or last, got 'first'; set probe.maps=all"),
        (
            {"points": -1},
            "features: points must be a whole number of at least 0, got -1; set probe.points=500, or 0 for",
        ),
        ({"export": True}, "features: no layer has a pair of queries and keys, got DepthwiseConv"),
    ):
        with pytest.raises(UserError) as error:
            features(model, digits, None, **given)
        assert str(error.value).startswith(said)


@pytest.mark.full
def test_features_of_digits_have_their_class_beside_them(digits_vit):
    """Measured 95.6 % where they are, 93.6 % on the plane."""
    model, images, labels = digits_vit
    with torch.no_grad():
        found = model.forward_pooled(images).x.numpy()
    near, drawn = nearest_of_class(found, labels.numpy()), nearest_of_class(plane_of(found), labels.numpy())
    assert near > 0.9 and drawn > 0.85


@pytest.mark.slow
@pytest.mark.full
def test_from_the_command_line(command, tmp_path):
    """Every probe of layers on one small run; pictures of the user have no classes."""
    small = ("logger=none", "model=vit_32px", "model.depth=2", "trainer.max_steps=2", "trainer.limit_val_batches=1")
    assert command("train", *small, "run.name=mine")[0] == 0
    for probe in ("logit_lens", "cka", "activation_sparsity", "receptive_field", "layer_rotation"):
        status, _, err = command("eval", "ckpt=outputs/mine/checkpoints/last", f"probe={probe}")
        assert status == 0, err
        place = tmp_path / f"outputs/mine/evaluation/digits-32-last-{probe}"
        assert json.loads(place.with_suffix(".json").read_text()) and (place / "report.html").exists()
        assert all(path.stat().st_size < 200_000 for path in place.glob("*.png")) and list(place.glob("*.png"))
    Image.new("RGB", (40, 30), (200, 30, 60)).save(tmp_path / "rose.png")
    status, out, err = command("eval", "ckpt=outputs/mine", "probe=features", "input=rose.png", "probe.export=true")
    assert status == 0 and "no t-SNE: images of the user have no classes" in out, err
    place = tmp_path / "outputs/mine/evaluation/rose-32-best-features"
    index, vectors = list(csv.DictReader((place / "vectors.csv").open())), load_file(place / "vectors.safetensors")
    assert {row["image"] for row in index} == {"rose"} and len(vectors) == 6 and (place / "rose.png").exists()
