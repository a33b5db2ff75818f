"""Figures, tables and charts from what a classifier made of every image."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, precision_recall_fscore_support

from models.probes.reading.outcomes import (
    Outcomes,
    chart_of_confusion,
    chart_of_reliability,
    confusions,
    figures_of,
    table_of_classes,
    table_of_images,
)

NAMES = ["ant", "bee", "cat", "dog"]
LABELS, SAID = [0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 2, 2]
SURE = [0.9, 0.6, 0.8, 0.7, 0.95, 0.5]


@pytest.fixture(scope="module")
def found():
    """Two batches, the second half of the data first."""
    outcomes = Outcomes()
    probabilities = torch.full((6, 4), 0.0)
    for row, (said, sure) in enumerate(zip(SAID, SURE, strict=True)):
        probabilities[row] = (1 - sure) / 3
        probabilities[row, said] = sure
    for rows in (slice(3, 6), slice(0, 3)):
        outcomes.update(probabilities[rows].log(), torch.tensor(LABELS[rows]), torch.arange(6)[rows])
    return outcomes.compute()


def test_the_order_is_that_of_the_data(found):
    assert found.indices.tolist() == list(range(6)) and found.labels.tolist() == LABELS
    assert found.predictions.tolist() == SAID and found.probabilities.tolist() == pytest.approx(SURE)


def test_figures(found):
    figures = figures_of(found, 4)
    assert figures["f1_macro"] == pytest.approx(f1_score(LABELS, SAID, average="macro"))
    assert figures["f1_weighted"] == pytest.approx(f1_score(LABELS, SAID, average="weighted"))
    # every image is in a bin of its own: |confidence - correct|, averaged
    errors = [abs(sure - (label == said)) for sure, label, said in zip(SURE, LABELS, SAID, strict=True)]
    assert figures["ece"] == pytest.approx(np.mean(errors), abs=1e-6)


def test_tables(found):
    rows = table_of_classes(found, NAMES)
    assert [row["class"] for row in rows] == ["ant", "bee", "cat"], "no image is a dog, and none is called so"
    wanted = precision_recall_fscore_support(LABELS, SAID)
    for name, values in zip(("precision", "recall", "f1", "images"), wanted, strict=True):
        assert [row[name] for row in rows] == pytest.approx(values.tolist(), abs=1e-6), name
    images = table_of_images(found, NAMES, [f"{i}.png" for i in range(6)])
    assert images[1] == {"file": "1.png", "label": "ant", "prediction": "bee", "probability": 0.6, "correct": 0}
    assert [row["correct"] for row in images] == [1, 0, 1, 1, 0, 1]
    assert confusions(found, NAMES) == "mistaken most often: bee as cat (1), ant as bee (1)"


@pytest.mark.full
def test_charts(found, tmp_path):
    for chart in (chart_of_confusion(found, NAMES), chart_of_reliability(found, 0.4)):
        chart.savefig(tmp_path / "chart.png")
        assert (tmp_path / "chart.png").stat().st_size > 5000
