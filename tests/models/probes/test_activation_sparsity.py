"""What is zero behind activation functions, and which channels never fire."""

import pytest
import pytorch_lightning as pl
import torch

from conf.errors import UserError
from data.module import ImageData
from data.sources.digits import Digits
from models import create_model, list_models
from models.probes.activation_sparsity import Counts, activation_sparsity, heard, unfused

SMALL = [name for name in list_models() if name.endswith("_32px") and "dit" not in name]


@pytest.fixture
def trainer() -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return ImageData(Digits(), 10, 32, batch_size=16, workers=0)


def test_shares_are_counted_over_calls():
    counts = Counts(near=0.1)
    counts.add(torch.tensor([[[0.0, -0.05, 2.0, 0.1]]]), -1)
    counts.add(torch.tensor([[[0.0, -3.0, 0.0, 0.0]]]), -1)
    row = counts.row("mlp.act", "GELU")
    assert (row["zero"], row["near"], row["negative"]) == (0.5, 0.75, 0.75)
    assert (row["dead_channels"], row["channels"]) == (2, 4), "the first and the last are never above 0.1"


def test_a_map_has_its_channels_second_unless_a_linear_layer_made_it():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 1), torch.nn.ReLU(), torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.GELU())
    )
    counts = {name: Counts(0.01) for name in ("1", "2.1")}
    with heard(model, {name: model.get_submodule(name) for name in counts}, counts):
        model(torch.randn(2, 3, 4, 7))
    assert [len(count.largest_C) for count in counts.values()] == [5, 9]


@pytest.mark.parametrize("activation", ["relu", pytest.param("topk", marks=pytest.mark.full)])
def test_dead_channels_of_a_model(activation, digits, trainer):
    model = create_model("vit_32px", num_classes=10, depth=2, activation=activation).eval()
    fc1 = model.stages[1].blocks[0].mlp.fc1 if len(model.stages[1].blocks) else model.stages[3].blocks[0].mlp.fc1
    with torch.no_grad():
        fc1.weight[:7] = 0
        fc1.bias[:7] = -1
    report = activation_sparsity(model, digits, trainer, images=20)
    first, second = sorted(report.tables["layers"], key=lambda row: row["dead_channels"])
    assert second["dead_channels"] >= 7 and second["channels"] == 384
    for row in (first, second):
        assert row["zero"] == row["negative"] <= row["near"] and row["function"] == (
            "ReLU" if activation == "relu" else "TopK"
        )
        assert activation == "relu" or row["zero"] >= 1 - 48 / 384, "an eighth of the channels is kept"


def test_activations_inside_a_convolution_are_seen():
    model = create_model("pvt_v2_b0", num_classes=3, image_size=32, depths=[1, 1, 1, 1]).eval()
    places = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.GELU)}
    counts = {name: Counts(0.01) for name in places}
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        with unfused(model), heard(model, places, counts):
            found = model(images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert all(count.total for count in counts.values()) and len(counts) == 4
    assert all(type(part) is torch.nn.GELU for part in (block.mlp.act for s in model.stages for block in s.blocks))


@pytest.mark.full
@pytest.mark.parametrize("name", [*SMALL, "timm/resnet10t", "timm/convnext_atto"])
def test_every_function_of_every_backbone_is_heard(name, digits, trainer):
    model = create_model(name, num_classes=10).eval()
    report = activation_sparsity(model, digits, trainer, images=4)
    assert report.tables["layers"] and report.lines == ["of 4 images; near 0: up to 0.01 on both sides"]
    assert all(row["zero"] <= row["near"] and row["zero"] <= row["negative"] <= 1 for row in report.tables["layers"])


def test_what_cannot_be_shown_is_said_before_work(digits):
    model = create_model("vit_32px", num_classes=10, depth=1)
    for given, said in (
        ({"near": -1}, "activation_sparsity: near must be a number of at least 0, got -1; set probe.near=0.01"),
        ({"images": 0}, "activation_sparsity: images must be a whole number of at least 1, or null for all, got 0"),
    ):
        with pytest.raises(UserError) as error:
            activation_sparsity(model, digits, None, **given)
        assert str(error.value).startswith(said)
    with pytest.raises(
        UserError, match="activation_sparsity: Linear has no activation function that is a module; choo"
    ):
        activation_sparsity(torch.nn.Linear(2, 2), digits, None)
