"""The deletion test of relevance: what a class loses where a map says that it matters, and where it says it does not.

Source: Samek et al., TNNLS 2017, arXiv:1509.06321 (regions are taken away in the order of their relevance).
A cell is taken away by giving it the mean colour of its picture. A map of relevance is worth something where the class
loses more by the most relevant cells than by as many random ones.
Shapes: B = images, C = channels, H W = pixels, Y X = map of relevance, N = Y·X cells, K = classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.probes import Report
from models.probes.drawing.charts import BLUE, ORANGE, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRACTIONS = (0.0, 0.1, 0.25, 0.5, 0.75)  # of the cells
TOLD = 0.25  # the one of these that is told
ORDERS = ("most", "least", "random")
DRAWS = 3  # random orders, averaged
CELLS = 16  # along a side; a map of more is averaged, or else single pixels would be taken away
AT_ONCE = 32  # images


def deletion_curve(
    model: nn.Module,
    images_BCHW: Tensor,
    targets_B: Tensor,
    maps_BYX: Tensor,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    several: bool = False,
) -> dict[str, list[float]]:
    """The mean probability of the classes with these fractions of the cells taken away, for each of `ORDERS`.

    Args:
        model: a classifier in evaluation mode.
        images_BCHW: as the model takes them.
        targets_B: the class of each.
        maps_BYX: how relevant each cell is; among equals chance decides.
        fractions: of the cells.
        seed: of the random orders.
        several: whether each class may be true by itself.
    """
    maps_BYX = _coarse(maps_BYX.detach().float().cpu())
    random_DBN = _random_orders(maps_BYX, seed)
    shuffled_BN = maps_BYX.flatten(1).gather(1, random_DBN[0])
    rising_BN = random_DBN[0].gather(1, shuffled_BN.argsort(dim=1, stable=True))
    orders = {"most": rising_BN.flip(1)[None], "least": rising_BN[None], "random": random_DBN}
    curves: dict[str, list[float]] = {}
    for name, order_DBN in orders.items():
        curves[name] = []
        for fraction in fractions:
            count = round(fraction * order_DBN.shape[-1])
            draws = order_DBN if 0 < count < order_DBN.shape[-1] else order_DBN[:1]  # none and all are the same
            gone = [_gone(maps_BYX, order, count) for order in draws]
            found = [_probability(model, images_BCHW, targets_B, cells, several) for cells in gone]
            curves[name].append(sum(found) / len(found))
    return curves


def deletion_test(
    model: nn.Module, images_BCHW: Tensor, targets_B: Tensor, maps_BYX: Tensor, several: bool = False
) -> Report:
    """The test as a part of a report: figures, the table and picture `deletion`, and a sentence; see `deletion_curve`.

    Figures are `deletion/<order>`, the probability without a quarter of the cells, `deletion/<order>_area`, the mean
    over what is taken away, and `deletion/whole`, the probability of the whole pictures.
    """
    curves = deletion_curve(model, images_BCHW, targets_B, maps_BYX, several=several)
    told = {order: curve[FRACTIONS.index(TOLD)] for order, curve in curves.items()}
    whole = curves["most"][0]
    figures = {"deletion/whole": whole} | {f"deletion/{order}": value for order, value in told.items()}
    figures |= {f"deletion/{order}_area": _area(curve) for order, curve in curves.items()}
    rows = [
        {"taken away": fraction} | {order: round(curve[i], 6) for order, curve in curves.items()}
        for i, fraction in enumerate(FRACTIONS)
    ]
    line = (
        f"deletion test on {len(images_BCHW)} image{'s' * (len(images_BCHW) != 1)}: without the most relevant "
        f"{TOLD:.0%} of the picture the class has a probability of {told['most']:.3f}, without as much at random "
        f"{told['random']:.3f}, without the least relevant {told['least']:.3f} (whole picture: {whole:.3f})"
    )
    return Report(figures, tables={"deletion": rows}, pictures={"deletion": chart_of(curves)}, lines=[line])


def probabilities(logits_BK: Tensor, several: bool) -> Tensor:
    """Of the classes, (B, K); with `several` each may be true by itself."""
    return logits_BK.float().sigmoid() if several else logits_BK.float().softmax(-1)


def chart_of(curves: dict[str, list[float]]) -> Figure:
    """The three curves over what is taken away."""
    figure = canvas(5.0, 3.8)
    axis = figure.subplots()
    styles = {"most": (ORANGE, "-"), "least": (BLUE, "-"), "random": ("0.5", "--")}
    words = {"most": "most relevant first", "least": "least relevant first", "random": "at random"}
    for order, (colour, line) in styles.items():
        axis.plot(FRACTIONS, curves[order], color=colour, linestyle=line, marker="o", label=words[order])
    axis.set(title="deletion test", xlabel="share of the picture taken away", ylabel="probability of the class")
    axis.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=len(curves), fontsize=8)
    return figure


def _coarse(maps_BYX: Tensor) -> Tensor:
    sides = tuple(min(side, CELLS) for side in maps_BYX.shape[1:])
    return maps_BYX if sides == maps_BYX.shape[1:] else F.adaptive_avg_pool2d(maps_BYX[:, None], sides)[:, 0]


def _random_orders(maps_BYX: Tensor, seed: int) -> Tensor:
    """Permutations of the cells, (DRAWS, B, N)."""
    generator = torch.Generator().manual_seed(seed)
    images, cells = len(maps_BYX), maps_BYX[0].numel()
    orders = [torch.randperm(cells, generator=generator) for _ in range(DRAWS * images)]
    return torch.stack(orders).view(DRAWS, images, cells)


def _gone(maps_BYX: Tensor, order_BN: Tensor, count: int) -> Tensor:
    """Whether a cell is among the first `count` of its order, (B, 1, Y, X)."""
    gone_BN = torch.zeros_like(order_BN, dtype=torch.bool)
    return gone_BN.scatter_(1, order_BN[:, :count], True).view(len(order_BN), 1, *maps_BYX.shape[1:])


@torch.no_grad()
def _probability(model: nn.Module, images_BCHW: Tensor, targets_B: Tensor, gone_B1YX: Tensor, several: bool) -> float:
    """The mean probability of the classes without these cells."""
    total = 0.0
    for images, targets, gone in _parts(images_BCHW, targets_B, gone_B1YX):
        hidden = F.interpolate(gone.to(images), size=images.shape[2:], mode="nearest") > 0.5
        changed = torch.where(hidden, images.mean((2, 3), keepdim=True), images)
        probabilities_BK = probabilities(model(changed), several)
        total += probabilities_BK.gather(1, targets.to(images.device)[:, None]).sum().item()
    return total / len(images_BCHW)


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(AT_ONCE) for tensor in tensors), strict=True)


def _area(curve: list[float]) -> float:
    """The mean height of the curve."""
    steps = zip(FRACTIONS, FRACTIONS[1:], curve, curve[1:], strict=False)
    return sum((end - start) * (a + b) / 2 for start, end, a, b in steps) / (FRACTIONS[-1] - FRACTIONS[0])
