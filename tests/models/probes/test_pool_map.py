"""Maps of pools are the weights by which they pool, and slots share every place."""

import pytest
import pytorch_lightning as pl
import torch

from conf.errors import UserError
from data.module import ImageData
from data.sources.digits import Digits
from models import create_model
from models.probes.pool_map import maps_of, pool_map
from models.probes.reading.images import first_images
from models.probes.slots import shares_of, slots

VIT = {"num_classes": 10, "depth": 1, "dim": 32}


@pytest.fixture(scope="module")
def given():
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    return ImageData(Digits(), 10, 32, 8, workers=0), trainer


def vit(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("vit_32px", **VIT, **options).eval()


def test_weights_lie_on_the_map(given):
    model = vit(pool="simpool")
    found = maps_of(model, first_images(given[0], 2).batch)
    assert found.weights.shape == (2, 1, 8, 8) and found.classes is None
    torch.testing.assert_close(found.weights.sum((-2, -1)), torch.ones(2, 1))
    report = pool_map(model, *given, images=2)
    assert [axis.get_title() for axis in report.pictures["pool_map"].axes] == ["0", "query 0", "359", "query 0"]
    row = report.tables["queries"][0]
    assert found.weights[0, 0, row["row"], row["column"]].item() == row["largest"] == found.weights[0].max().item()
    assert report.figures["queries"] == 1 and report.figures["on_class_tokens"] == 0


def test_class_tokens_are_no_places(given):
    model = vit(pool="attention_aggregation", class_token=True)
    found = maps_of(model, first_images(given[0], 1).batch)
    assert found.weights.shape == (1, 1, 8, 8) and found.on_prefix.item() > 0
    pooled = model.forward_pooled(first_images(given[0], 1).batch)
    torch.testing.assert_close(found.weights.flatten(2), pooled.weights[..., -64:].detach())


def test_a_query_for_each_class_comes_by_its_logit(given):
    target = "models.pools.attention_aggregation.AttentionAggregation"
    model = vit(pool={"_target_": target, "_partial_": True, "queries": "classes"})
    batch = first_images(given[0], 1).batch
    found = maps_of(model, batch)
    assert found.classes[0].tolist() == model(batch)[0].argsort(descending=True).tolist()
    weights = model.forward_pooled(batch).weights[0, found.classes[0, 0]]
    torch.testing.assert_close(found.weights[0, 0].flatten(), weights[-64:].detach())
    report = pool_map(model, *given, images=1, queries=3)
    assert [axis.get_title() for axis in report.pictures["pool_map"].axes][1:] == [
        str(label) for label in found.classes[0, :3].tolist()
    ]
    assert len(report.tables["queries"]) == 10


def test_slots_share_every_place(given):
    model = vit(pool="slot")
    batch = first_images(given[0], 2).batch
    shares = shares_of(model, batch)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 8, 8))
    weights = model.forward_pooled(batch).weights.unflatten(-1, (8, 8))
    torch.testing.assert_close(shares / shares.sum((-2, -1), keepdim=True), weights.detach(), rtol=1e-5, atol=1e-7)
    report = slots(model, *given, images=2)
    titles = [axis.get_title() for axis in report.pictures["slots"].axes]
    assert titles == ["0", "slots", *(f"slot {i}" for i in range(4)), "359", "slots", *(f"slot {i}" for i in range(4))]
    assert sum(row["share"] for row in report.tables["slots"]) == pytest.approx(2)
    assert sum(row["first_in"] for row in report.tables["slots"]) == pytest.approx(2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "pool_map: the pool of ViT (its mean or its class token) has no weights; choose a model"),
        ({"pool": "mean"}, "pool_map: Mean has no weights; choose a model that was trained with e.g. pool=simpool"),
        ({"pool": "class_token", "class_token": True}, "pool_map: ClassToken has no weights"),
    ],
)
def test_a_pool_without_weights(given, options, text):
    model = vit(**options)
    with pytest.raises(UserError) as error:
        pool_map(model, *given)
    assert text in str(error.value)
    with pytest.raises(UserError, match=r"slots: \w+ has no slots; choose a model that was trained with pool=slot"):
        slots(model, *given)


def test_what_cannot_be_asked(given):
    for value, text in ((0, "a whole number of at least 1, got 0"), (12, "at most 11, got 12; set probe.queries=8")):
        with pytest.raises(UserError, match=f"probe: queries must be {text}"):
            pool_map(vit(pool="simpool"), *given, queries=value)
    with pytest.raises(UserError, match="pool_map: Linear has no pool of tokens"):
        pool_map(torch.nn.Linear(1, 1), *given)
