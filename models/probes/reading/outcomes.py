"""What a classifier makes of every image, and the figures, tables and charts that follow from it.

Shapes: N = images that were measured, K = classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)
from torchmetrics.utilities.data import dim_zero_cat

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 15  # of confidence, as calibration errors are published with
NAMED, NUMBERED = 40, 15  # classes up to which the confusion chart names them, and counts in its cells
CONFUSIONS = 3  # named below the table


class Found(NamedTuple):
    """In the order of the data: position (N,), label (N,), predicted class (N,) and its probability (N,)."""

    indices: Tensor
    labels: Tensor
    predictions: Tensor
    probabilities: Tensor


class Outcomes(Metric):
    """Collects `Found` over batches and processes."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in Found._fields:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits_NK: Tensor, labels_N: Tensor, indices_N: Tensor) -> None:
        probabilities_N, predictions_N = logits_NK.softmax(-1).max(-1)
        self.indices.append(indices_N)
        self.labels.append(labels_N)
        self.predictions.append(predictions_N)
        self.probabilities.append(probabilities_N)

    def compute(self) -> Found:
        found = Found(*(dim_zero_cat(getattr(self, name)).cpu() for name in Found._fields))
        order = found.indices.argsort()
        return Found(*(values[order] for values in found))


def figures_of(found: Found, num_classes: int) -> dict[str, float]:
    """F1 as the mean over classes and weighted by their images; the expected calibration error."""
    pair = found.predictions, found.labels
    return {
        "f1_macro": multiclass_f1_score(*pair, num_classes, average="macro").item(),
        "f1_weighted": multiclass_f1_score(*pair, num_classes, average="weighted").item(),
        "ece": binary_calibration_error(found.probabilities, _correct(found).int(), BINS).item(),
    }


def table_of_classes(found: Found, names: list[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and the number of images of every class that is in the data or was predicted."""
    count, pair = len(names), (found.predictions, found.labels)
    columns = {
        "precision": multiclass_precision(*pair, count, average="none"),
        "recall": multiclass_recall(*pair, count, average="none"),
        "f1": multiclass_f1_score(*pair, count, average="none"),
    }
    images, predicted = (torch.bincount(values, minlength=count).tolist() for values in pair[::-1])
    rows = []
    for label in (i for i in range(count) if images[i] or predicted[i]):
        row = {"class": names[label]} | {name: round(values[label].item(), 6) for name, values in columns.items()}
        rows.append(row | {"images": images[label], "predicted": predicted[label]})
    return rows


def table_of_images(found: Found, names: list[str], files: list[str]) -> list[dict[str, Any]]:
    """What was predicted of each image, and how surely; `correct` is 0 or 1."""
    rows = zip(*(values.tolist() for values in (*found, _correct(found).int())), strict=True)
    return [
        {
            "file": files[index],
            "label": names[label],
            "prediction": names[predicted],
            "probability": round(probability, 6),
            "correct": correct,
        }
        for index, label, predicted, probability, correct in rows
    ]


def confusions(found: Found, names: list[str]) -> str:
    """What is mistaken for what most often, in one line; "" where nothing is."""
    matrix = _matrix(found, len(names))
    np.fill_diagonal(matrix, 0)
    worst = [divmod(int(place), len(names)) for place in matrix.ravel().argsort(kind="stable")[::-1][:CONFUSIONS]]
    told = [f"{names[was]} as {names[said]} ({matrix[was, said]})" for was, said in worst if matrix[was, said]]
    return f"mistaken most often: {', '.join(told)}" if told else ""


def chart_of_confusion(found: Found, names: list[str]) -> Figure:
    """Rows are classes, columns predictions; the colour is the share of the row."""
    matrix = _matrix(found, len(names))
    kept = np.flatnonzero(matrix.sum(0) + matrix.sum(1))
    matrix, names = matrix[np.ix_(kept, kept)], [names[i] for i in kept]
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = 2.5 + min(8.0, max(2.0, 0.3 * len(names)))
    figure = _figure(side + 0.6, side)
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set(title="confusion", xlabel="predicted", ylabel="class")
    if len(names) <= NAMED:
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks(range(len(names)), names)
    for row, column in np.argwhere(matrix) if len(names) <= NUMBERED else ():
        colour = "white" if shares[row, column] > 0.5 else "black"
        axis.text(column, row, matrix[row, column], ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axis, fraction=0.046, label="share of the class's images")
    return figure


def chart_of_reliability(found: Found, error: float) -> Figure:
    """Accuracy against confidence: bars on the diagonal are what the model says they are; below, how many images."""
    edges = np.linspace(0, 1, BINS + 1)
    probabilities, correct = found.probabilities.numpy(), _correct(found).double().numpy()
    counts = np.histogram(probabilities, edges)[0]
    right = np.histogram(probabilities, edges, weights=correct)[0]
    figure = _figure(4.5, 5.0)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = counts > 0
    upper.bar(edges[:-1][filled], right[filled] / counts[filled], 1 / BINS, align="edge", edgecolor="white")
    upper.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    upper.set(title=f"reliability, ECE {error:.2%}", ylabel="accuracy", ylim=(0, 1))
    lower.bar(edges[:-1], counts, 1 / BINS, align="edge", edgecolor="white", color="grey")
    lower.set(xlabel="confidence", ylabel="images", xlim=(0, 1))
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _correct(found: Found) -> Tensor:
    return found.predictions == found.labels


def _matrix(found: Found, num_classes: int) -> np.ndarray:
    return multiclass_confusion_matrix(found.predictions, found.labels, num_classes).numpy()
