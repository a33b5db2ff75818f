"""Attention flow: how much could flow to what the classifier reads from each cell, if weights were the widths of pipes.

Source: Quantifying Attention Flow in Transformers, Abnar and Zuidema, ACL 2020, arXiv:2005.00928, section 3.2.
Layers are joined by the same matrices as in rollout; the map is the maximum flow between the classifier's token and
each cell alone, scaled so that all of them sum to one. Its time grows with layers and the third power of the cells.
Shapes: L = layers, N = tokens, Y X = map.
"""

from typing import Any

import networkx
import pytorch_lightning as pl
import torch
from networkx.algorithms.flow import build_residual_network, shortest_augmenting_path
from torch import Tensor, nn

from conf import looking
from conf.looking import Point
from conf.values import flag
from models.attention import Mixer
from models.probes import Report, Subject
from models.probes.explanations import Explained, explained_images, report_of
from models.probes.reading.paths import as_map, followed, readers
from models.probes.rollout import called, check_heads, with_residual

WHO = "flow"
MOST = 64  # cells


def flow(
    model: nn.Module,
    data: pl.LightningDataModule,
    subject: Subject,
    input: Any = None,
    images: int = 1,
    heads: str = "mean",
    point: Any = None,
    deletion: bool = True,
) -> Report:
    """A map of each image of the last stages with one map, of at most 64 cells, and the deletion test of all.

    Args:
        model, data, subject, input: see `models.probes`.
        images: how many; each takes from seconds to minutes.
        heads: how they become one matrix: "mean", "max" or "min".
        point: fractions from the left and from the top: of the token there instead of what the classifier reads.
        deletion: the test too, which a map of a point is not given.

    Raises:
        UserError: options that are wrong, a layer without a matrix whose rows sum to one, or too many cells.
    """
    check_heads(heads)
    flag("probe", "deletion", deletion, fix="set probe.deletion=true or false")
    point = looking.point(point)
    layers = followed(WHO, model, "last", stochastic=True, most=MOST)

    def explain(image_1CHW: Tensor, _: Tensor) -> Explained:
        return Explained(flow_map(model, image_1CHW, layers, heads, point), {})

    found = explained_images(WHO, model, data, images, explain, labelled=input is None)
    return report_of(WHO, model, data, subject, found, deletion and point is None, point)


@torch.no_grad()
def flow_map(
    model: nn.Module, image_1CHW: Tensor, layers: dict[str, Mixer], heads: str = "mean", point: Point | None = None
) -> Tensor:
    """The map (1, Y, X) of one image; see `flow`."""
    calls = called(model, image_1CHW, layers)
    grid = next(iter(calls.values())).grid
    reads_N = readers(model, image_1CHW, grid, point)[0, 0]
    matrices = [with_residual(layers[name], name, call, heads, 0.0, WHO)[0] for name, call in calls.items()]
    flows_N = flows(torch.stack(matrices), reads_N)
    return as_map((flows_N / flows_N.sum())[None, None], grid)[:, 0]


def flows(matrices_LNN: Tensor, reads_N: Tensor) -> Tensor:
    """The maximum flow to the reader of the last layer's tokens from each token of the first, (N,), at most 1 each.

    Args:
        matrices_LNN: of each layer from the first, what a token takes of those before it.
        reads_N: what the reader takes of each token of the last.
    """
    graph = networkx.DiGraph()
    depth = len(matrices_LNN)
    for layer, matrix_NN in enumerate(matrices_LNN.tolist()):
        for query, row in enumerate(matrix_NN):
            edges = (((layer + 1, query), (layer, key), weight) for key, weight in enumerate(row) if weight > 0)
            graph.add_weighted_edges_from(edges, weight="capacity")
    read = (("reader", (depth, token), share) for token, share in enumerate(reads_N.tolist()) if share > 0)
    graph.add_weighted_edges_from(read, weight="capacity")
    residual = build_residual_network(graph, "capacity")
    found = [
        networkx.maximum_flow_value(graph, "reader", (0, token), flow_func=shortest_augmenting_path, residual=residual)
        for token in range(len(reads_N))
    ]
    return torch.tensor(found, dtype=torch.float32)
