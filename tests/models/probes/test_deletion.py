"""The deletion test of maps, and which class is explained."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conf.errors import UserError
from models.probes.deletion import FRACTIONS, deletion_curve, deletion_test
from models.probes.reading.targets import check_target, target_classes


class Corner(nn.Module):
    """Class 1 by how far the cell in the upper left corner, which alone it looks at, is from the mean colour."""

    def forward(self, images):
        evidence = (images[..., :2, :2] - MEAN).abs().mean((1, 2, 3))
        return torch.stack([torch.zeros_like(evidence), 4 * evidence], dim=1)


IMAGES, TARGETS = torch.zeros(2, 3, 8, 8), torch.ones(2, dtype=torch.long)
IMAGES[..., :2, :2] = 8.0
MEAN = 0.5
MAPS = torch.zeros(2, 4, 4)
MAPS[:, 0, 0] = 1.0


def test_what_the_class_needs_goes_first_and_last():
    curves = deletion_curve(Corner(), IMAGES, TARGETS, MAPS)
    whole, half = torch.tensor(4 * 7.5).sigmoid().item(), 0.5
    assert curves["most"] == pytest.approx([whole] + [half] * 4, abs=1e-6)
    assert curves["least"] == pytest.approx([whole] * 5, abs=1e-6)
    assert half < curves["random"][3] < whole
    assert deletion_curve(Corner(), IMAGES, TARGETS, MAPS) == curves
    assert deletion_curve(Corner(), IMAGES, 1 - TARGETS, MAPS, several=True)["most"] == [0.5] * 5


def test_a_map_without_an_opinion_is_as_good_as_chance_and_pixels_are_averaged():
    flat = deletion_curve(Corner(), IMAGES[:1], TARGETS[:1], torch.ones(1, 4, 4), fractions=[0.0, 1.0])
    assert flat["most"] == flat["least"] == flat["random"] and flat["most"][1] == 0.5
    fine = torch.nn.functional.interpolate(MAPS[:, None], size=64, mode="nearest")[:, 0]
    assert deletion_curve(Corner(), IMAGES, TARGETS, fine)["most"][1] == 0.5


def test_the_part_of_a_report():
    report = deletion_test(Corner(), IMAGES, TARGETS, MAPS)
    assert report.figures["deletion/most"] == pytest.approx(0.5) and report.figures["deletion/least_area"] > 0.99
    assert [row["taken away"] for row in report.tables["deletion"]] == list(FRACTIONS)
    assert set(report.tables["deletion"][0]) == {"taken away", "most", "least", "random"}
    (line,) = report.lines
    assert line.startswith("deletion test on 2 images: without the most relevant 25% of the picture the class has a pr")
    assert "0.500, without as much at random" in line and list(report.pictures) == ["deletion"]


def test_the_class_that_is_explained():
    data = SimpleNamespace(num_classes=3, class_names=["ant", "bee"])
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 1.0, 0.0]])
    for target, found in (("top", [1, 0]), ("label", [2, 2]), ("bee", [1, 1]), (2, [2, 2])):
        check_target("relevance", target, data, labelled=True)
        assert target_classes("relevance", target, data, logits, [2, 2]).tolist() == found
    for target, text in (
        ("bea", r"relevance: there is no class 'bea'; did you mean 'bee'\?; set probe.target=top, label, a number or"),
        (3, r"relevance: target must be a class from 0 to 2, got 3; set probe.target="),
        (True, r"relevance: target must be a class from 0 to 2, got True; set"),
        ("label", r"relevance: the images of input= have no labels, got target=label; set probe.target=top"),
    ):
        with pytest.raises(UserError, match=text):
            check_target("relevance", target, data, labelled=False)
