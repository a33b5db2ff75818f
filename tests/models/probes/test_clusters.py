"""The clusters that are drawn are those in which tokens attend."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from conf.errors import UserError
from data.module import ImageData
from data.sources.digits import Digits
from models import create_model
from models.attention import Grid, mixers_of
from models.attention.recording import recorded
from models.probes.clusters import Clusters, clusters, clusters_of, coloured, labels_of, summed

VIT = {"num_classes": 10, "depth": 1, "dim": 32}


@pytest.fixture(scope="module")
def given():
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    return ImageData(Digits(), 10, 32, 8, workers=0), trainer


def look(**options) -> tuple[Clusters, torch.Tensor]:
    """The clusters of a layer for two images, and its weights."""
    torch.manual_seed(0)
    model, images = create_model("vit_32px", **VIT, **options).eval(), torch.randn(2, 3, 32, 32)
    ((name, mixer),) = mixers_of(model)
    with torch.no_grad(), recorded(model) as calls:
        model(images)
        weights = mixer.token_weights(*calls[name]).weights
    return clusters_of(model, {name: mixer}, images)[name], weights


def test_tokens_of_a_cluster_see_each_other():
    one, weights = look(attention="boat", cluster=10, overlap=0)
    label = labels_of(one).flatten(2)
    assert one.members.shape == (2, 4, 64, 8) and torch.equal(one.members.sum(-1), torch.ones(2, 4, 64))
    assert torch.equal(weights > 0, label[..., None] == label[..., None, :])
    assert summed(one) | {"neighbours": 0, "chance": 0} == {
        **{"clusters": 8, "in_none": 0.0, "in_several": 0.0, "neighbours": 0, "chance": 0}
    }
    assert summed(one)["chance"] == pytest.approx(1 / 8)


def test_tokens_that_no_cluster_takes():
    one, weights = look(attention="routing", clusters=4, members=8, cover="none")
    none = one.members.sum(-1) == 0
    assert none.any() and torch.equal(none, (weights == 0).all(-1))
    assert torch.equal(labels_of(one).flatten(2) == -1, none)
    assert summed(one)["in_none"] == pytest.approx(none.float().mean().item())
    several = (one.members > 0).sum(-1) > 1
    torch.testing.assert_close(one.members.sum(-1)[several], torch.ones(int(several.sum())))


def test_neighbours_and_chance():
    members = torch.zeros(1, 1, 4, 3)
    members[0, 0, [0, 1, 2], [2, 2, 0]] = 1  # cells 2 2 / 0 none
    found = summed(Clusters(members, Grid(2, 2)))
    assert found == {
        "clusters": 3,
        "in_none": 0.25,
        "in_several": 0.0,
        "neighbours": 0.25,
        "chance": 0.25 + 1 / 16,
    }


def test_colours_are_where_the_cells_are():
    drawn = np.asarray(coloured(Image.new("RGB", (32, 32), "white"), np.array([[0, 1], [-1, 0]]), 2))
    half = drawn.shape[0] // 2
    assert (drawn[half:, :half] == 255).all(), "a token in no cluster stays as it is"
    first, second = drawn[0, 0].tolist(), drawn[0, -1].tolist()
    assert first != second and drawn[-1, -1].tolist() == first and (drawn[:half, half:] == second).all()


def test_the_report(given):
    report = clusters(create_model("vit_32px", **VIT, attention="boat"), *given, images=2)
    (first, second), name = report.pictures, "stages.2.blocks.0.attn"
    assert list(report.captions) == [first, second]
    assert [axis.get_title() for axis in report.pictures[first].axes] == [name, *(f"head {head}" for head in range(4))]
    rows = report.tables["clusters"]
    assert len(rows) == 2 * 4 * 2 and {row["tokens"] for row in rows} == {32}
    assert report.figures[f"{name}/clusters"] == 2


def test_a_model_without_clusters(given):
    text = "clusters: no layer has clusters, got SoftmaxCore; choose attention=boat or routing"
    with pytest.raises(UserError, match=text):
        clusters(create_model("vit_32px", **VIT), *given)
