"""Tokens, queries and keys of every head as files that t-SNE, UMAP and AttentionViz take.

Source: AttentionViz, Yeh et al., IEEE TVCG 2024 (VIS 2023), arXiv:2305.03210, section 4.1: queries and keys share one
space once keys are moved to the centre of the queries, which no softmax over keys notices, and both are scaled so that
their products stay.
Shapes: B = images, M = heads, N = tokens, S = keys, C = channels, D = channels per head; V = B·N or B·S vectors.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.attention import Grid, Mixer
from models.attention.contract.heads import split_heads
from models.attention.gating import ungated
from models.attention.multihead import MultiHead
from models.attention.recording import Call
from models.probes.reading.images import Images


class Exported(NamedTuple):
    """tensors: by name, `<layer>.tokens` (V, C), `<layer>.queries` and `<layer>.keys` (M, V, D). index: what each of
    the vectors is of, in their order; heads share it."""

    tensors: dict[str, Tensor]
    index: list[dict[str, Any]]


def projects(mixer: Mixer) -> bool:
    """Whether it has queries and keys."""
    mixer = ungated(mixer)
    return isinstance(mixer, MultiHead) or isinstance(getattr(mixer, "qkv", None), nn.Linear)


@torch.no_grad()
def exported(mixers: dict[str, Mixer], calls: dict[str, Call], seen: Images) -> Exported:
    """Of these layers, from what they were given."""
    tensors, index = {}, []
    for name, mixer in mixers.items():
        call = calls[name]
        q_BMND, k_BMSD, kv_grid = queries_keys(mixer, *call)
        q_MVD, k_MVD = (x.transpose(0, 1).flatten(1, 2).float() for x in (q_BMND, k_BMSD))
        q_MVD, k_MVD = in_one_space(q_MVD, k_MVD)
        tensors |= {f"{name}.tokens": call.x_BNC.flatten(0, 1).float().cpu().contiguous()}
        tensors |= {f"{name}.queries": q_MVD.cpu().contiguous(), f"{name}.keys": k_MVD.cpu().contiguous()}
        index += _index(name, "query", call.grid, seen) + _index(name, "key", kv_grid, seen)
    return Exported(tensors, index)


def queries_keys(mixer: Mixer, x_BNC: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Grid]:
    """Queries (B, M, N, D), keys (B, M, S, D) and the map of the keys, of MoH and its like those that are gated.

    As they are projected, where a mechanism or a transform changes them in windows or regions.
    """
    mixer = ungated(mixer)
    if isinstance(mixer, MultiHead):
        x = x_BNC if mixer.pre is None else mixer.pre(x_BNC, grid)
        whole = mixer.layout.between(grid) == grid
        q, k, _, kv_grid = (mixer._heads if whole else mixer._project)(x, grid)
        return q, k, kv_grid
    qkv_BNC = mixer.qkv(x_BNC)
    width = getattr(mixer, "qk_dim", qkv_BNC.shape[-1] // 3)
    q, k = split_heads(qkv_BNC[..., : 2 * width], 2, mixer.site.num_heads)
    return q, k, grid


def in_one_space(q_MVD: Tensor, k_MVD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys at the centre of the queries and of their mean length: softmax(q kᵀ) over keys stays what it was."""
    k_MVD = k_MVD - k_MVD.mean(1, keepdim=True)
    lengths = [x.norm(dim=-1).mean(1).clamp_min(1e-12) for x in (q_MVD - q_MVD.mean(1, keepdim=True), k_MVD)]
    scale = (lengths[1] / lengths[0]).sqrt()[:, None, None]
    q_MVD, k_MVD = q_MVD * scale, k_MVD / scale
    return q_MVD, k_MVD + q_MVD.mean(1, keepdim=True)


def _index(layer: str, kind: str, grid: Grid, seen: Images) -> list[dict[str, Any]]:
    """A row for each vector; class tokens have no row and column."""
    places = [("", "")] * grid.prefix + [(row, column) for row in range(grid.height) for column in range(grid.width)]
    labels = seen.labels or [""] * len(seen.names)
    pairs = [(name, label, place) for name, label in zip(seen.names, labels, strict=True) for place in places]
    return [
        {"layer": layer, "kind": kind, "vector": number, "image": name, "label": label, "row": row, "column": column}
        for number, (name, label, (row, column)) in enumerate(pairs)
    ]
