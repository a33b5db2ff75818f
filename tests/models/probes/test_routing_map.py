"""The routes that are drawn are those along which a model attends."""

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from conf.errors import UserError
from data.module import ImageData
from data.sources.digits import Digits
from models import create_model
from models.attention import Grid, mixers_of, to_moh
from models.attention.biformer import Regions
from models.probes import Subject
from models.probes.reading.images import first_images
from models.probes.routing_map import ASKING, VISITED, Routes, _beyond, drawn, region_at, routing_map, summed

SUBJECT = Subject("", None, None, "raw", {}, Path())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("biformer_32px", num_classes=10, num_regions=4, topk=[2, 3]).eval()


@pytest.fixture(scope="module")
def given():
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    return ImageData(Digits(), 10, 32, 4, workers=0), trainer, SUBJECT


def test_what_is_drawn_is_where_the_weights_are(model, given):
    report = routing_map(model, *given, images=2)
    assert list(report.pictures) == list(report.captions) and len(report.pictures) == 2
    names = [name for name, _ in mixers_of(model)]
    rows = report.tables["routes"]
    assert {row["layer"] for row in rows} == set(names) and len(rows) == 4 * 2 * 16
    first = model.stages[0].blocks[0].attn
    seen = {}
    handle = first.register_forward_pre_hook(lambda module, given: seen.update(given=given))
    with torch.no_grad():
        model(first_images(given[0], 2).batch[:1])
        matrix_BMNN = first.attention_matrix(*seen["given"])
    handle.remove()
    # tokens of 2x2 cells make a region of the map of 8x8
    token = torch.arange(64).unflatten(0, (4, 2, 4, 2)).transpose(1, 2).reshape(16, 4)
    open_RR = (matrix_BMNN[0].sum(0)[token][:, :, token] > 0).any(1).any(-1)
    listed = [set(map(int, row["visits"].split())) for row in rows if row["layer"] == names[0]][:16]
    assert [set(row.nonzero().flatten().tolist()) for row in open_RR] == listed
    assert report.figures[f"{names[0]}/regions"] == 16 and report.figures[f"{names[2]}/visited"] == 3


def test_every_region_in_turn(model, given):
    report = routing_map(model, *given, images=1, layers=-1, every=4)
    (name,) = report.pictures
    assert name == "routes-stages.1.blocks.1.attn"
    titles = [axis.get_title() for axis in report.pictures[name].axes]
    assert titles == ["0", "region 2", "region 6", "region 10", "region 14"]


def test_regions_are_drawn_where_they_are():
    one = Routes(torch.tensor([[[3, 1], [0, 1], [2, 2], [0, 3]]]), Regions(2, 2, 2, 3), Grid(4, 5))
    picture = np.asarray(drawn(Image.new("RGB", (250, 200)), one, 0, [3, 1]))

    def at(x: float, y: float) -> tuple[int, ...]:
        return tuple(picture[int(y * picture.shape[0]), int(x * picture.shape[1])].tolist())

    assert at(0.005, 0.25) == ASKING and at(0.3, 0.25) == (0, 0, 0)
    assert at(0.3, 0.75) == (0, 0, 0), "region 2 is not visited"
    best, second = at(0.8, 0.75), at(0.8, 0.25)
    assert best[2] > second[2] > 0 and best == tuple(round(value * 190 / 255) for value in VISITED)
    assert at(0.599, 0.99)[2] == 0, "a region of 3 of the 5 columns ends at 0.6"
    assert region_at((0.7, 0.4), one.regions, one.grid) == 1 and region_at(None, one.regions, one.grid) == 2
    assert summed(one) == {"regions": 4, "visited": 2, "own": 3 / 4, "seen": 1.0}


def test_padding_is_not_drawn_and_said(given):
    torch.manual_seed(0)
    model = create_model("biformer_32px", num_classes=10, num_regions=3, topk=9).eval()  # 3 x 3 regions of 3 on 8 x 8
    report = routing_map(model, *given, images=1, layers=0)
    assert report.lines == [] and report.figures["stages.0.blocks.0.attn/regions"] == 9
    mixer = model.stages[0].blocks[0].attn
    assert mixer.regions(Grid(4, 8)) == Regions(3, 3, 2, 3)
    one = Routes(torch.zeros(1, 9, 1, dtype=torch.int64) + 8, Regions(3, 3, 2, 3), Grid(4, 8))
    assert _beyond({"layer": one}) == ["layer: 100% of the routes lead to padding beyond the map, which is not drawn"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"images": 0}, "probe: images must be a whole number of at least 1, got 0"),
        ({"every": 0}, "probe: every must be a whole number of at least 1, got 0; set probe.every=8, or null"),
        ({"every": 2, "point": [0, 0]}, "probe: point and every both say who asks, got [0, 0] and 2; leave one"),
        ({"point": [0.5, 2]}, "probe: point must be two fractions from 0 to 1"),
        ({"layers": "stages.0.blocks.9.attn"}, "routing_map: there is no layer 'stages.0.blocks.9.attn'"),
    ],
)
def test_what_cannot_be_asked(model, given, options, text):
    with pytest.raises(UserError) as error:
        routing_map(model, *given, **options)
    assert text in str(error.value)


def test_a_model_without_routes(given):
    with pytest.raises(
        UserError, match="routing_map: no layer has a router of regions, got SoftmaxCore; choose a biformer"
    ):
        routing_map(create_model("vit_32px", num_classes=10), *given)


def test_gated_heads_keep_their_routes(given):
    model = create_model("biformer_32px", num_classes=10).eval()
    to_moh(model, 1, 1)
    assert routing_map(model, *given, images=1).figures["stages.0.blocks.0.attn/regions"] == 49
