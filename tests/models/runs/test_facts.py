"""What is known of a run before its first step."""

import numpy as np
import torch

from data.module import ImageData
from data.sources.fake import Fake
from models import create_model
from models.runs.facts import count, facts_of, fingerprint


def data_of(source: Fake, size: int = 32) -> ImageData:
    return ImageData(source, source.num_classes, size, 4)


def test_a_model_that_cannot_be_run_has_no_figure():
    assert count(torch.nn.Linear(3, 2), (32, 32)) is None


def test_facts_name_cost_and_data():
    facts = facts_of(create_model("vit_32px", num_classes=10), data_of(Fake(num_classes=10)))
    assert (facts["parameters"], facts["flops"]) == (459_370, 31_753_152)
    assert facts["data_fingerprint"] == fingerprint(data_of(Fake(num_classes=10)))


def test_a_fingerprint_follows_classes_labels_and_numbers():
    one = fingerprint(data_of(Fake(num_classes=3)))
    assert one == fingerprint(data_of(Fake(num_classes=3), size=64)) and len(one) == 12
    renamed, other = Fake(num_classes=3), Fake(num_classes=3)
    renamed.classes = ["a", "b", "c"]
    other.train.labels = np.roll(other.train.labels, 1)
    found = [fingerprint(data_of(s)) for s in (renamed, other, Fake(num_classes=3, val_images=63), Fake(num_classes=4))]
    assert len({one, *found}) == 5
