"""Which tokens attend together where the content decides: the clusters of each head, coloured, over the picture.

Shapes: B = images, M = heads, N = H·W tokens, R = clusters.
"""

from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor, nn

from models.attention.contract import Grid, Mixer
from models.attention.contract.layout import SCATTERED
from models.attention.gating import ungated
from models.attention.multihead import MultiHead
from models.attention.recording import recorded
from models.backbones.base import check_places
from models.probes import Report
from models.probes.drawing.overlays import enlarged, sheet
from models.probes.reading.images import Images, first_images
from models.probes.reading.layers import chosen_layers

WHO = "clusters"
STRENGTH = 0.65  # of the colours


class Clusters(NamedTuple):
    """Of one layer: how much of what a token gets comes from each cluster (B, M, N, R), 0 for tokens in none."""

    members: Tensor
    grid: Grid


def clusters(
    model: nn.Module,
    data: pl.LightningDataModule,
    trainer: pl.Trainer,
    input: Any = None,
    images: int = 4,
    layers: Any = "all",
) -> Report:
    """A picture for each image: a row for each layer, a panel for each head.

    Args:
        model, data, trainer, input: see `models.probes`.
        images: how many pictures.
        layers: which layers; see `models.probes.reading.layers.chosen_layers`.

    Raises:
        UserError: an option that has no meaning, or a model or layer without clusters.
    """
    check_places(model, WHO)
    mixers = chosen_layers(WHO, model, layers, clustered, "clusters", "attention=boat or routing")
    seen = first_images(data, images, trainer.strategy.root_device)
    found = clusters_of(model, mixers, seen.batch)
    figures = {name: summed(one) for name, one in found.items()}
    said = "tokens of a colour attend together; a row for each layer, a panel for each head, tokens in no cluster grey"
    return Report(
        {f"{name}/{what}": value for name, one in figures.items() for what, value in one.items()},
        rows={name: _told(one) for name, one in figures.items()},
        tables={"clusters": [row for name, one in found.items() for row in _table(name, one, seen.names)]},
        pictures={name: _picture(found, seen, i) for i, name in enumerate(seen.names)},
        captions={name: f"{name}: {said}" for name in seen.names},
    )


def clustered(mixer: Mixer) -> bool:
    """Whether what tokens hold decides who attends to whom, in groups."""
    inside = ungated(mixer)
    return isinstance(inside, MultiHead) and inside.layout.keys == SCATTERED


@torch.no_grad()
def clusters_of(model: nn.Module, mixers: dict[str, Mixer], batch: Tensor) -> dict[str, Clusters]:
    """Of these mixers by name, for a batch of images."""
    with recorded(model) as calls:
        model(batch)
    return {name: Clusters(members(ungated(mixer), *calls[name]), calls[name].grid) for name, mixer in mixers.items()}


def members(mixer: MultiHead, x_BNC: Tensor, grid: Grid) -> Tensor:
    """(B, M, N, R): what tokens get where every cluster gives its own number, as one of R."""
    groups = mixer.groups(x_BNC, grid)
    W, M, T, _ = groups.q.shape
    R = W // len(x_BNC)
    each = torch.eye(R, device=x_BNC.device).repeat(len(x_BNC), 1)
    return mixer.put_back(each[:, None, None].expand(-1, M, T, -1), groups, grid)


def labels_of(one: Clusters) -> Tensor:
    """(B, M, H, W): the cluster that a token gets most from, the first of several; -1 for tokens in none."""
    most, label = one.members.max(-1)
    return label.masked_fill(most == 0, -1).unflatten(-1, one.grid[:2])


def summed(one: Clusters) -> dict[str, float]:
    """How many clusters there are, the shares of tokens in none and in several, and how much of a map they are.

    `neighbours` is the share of cells beside each other that are in the same cluster, `chance` that of any two cells.
    """
    label = labels_of(one)
    inside = (one.members > 0).sum(-1)
    pairs = ((label[..., 1:], label[..., :-1]), (label[..., 1:, :], label[..., :-1, :]))
    same = torch.cat([((a == b) & (a >= 0)).flatten() for a, b in pairs]).float()
    sizes = torch.stack([(label == r).float().mean((-2, -1)) for r in range(one.members.shape[-1])])
    return {
        "clusters": one.members.shape[-1],
        "in_none": (inside == 0).float().mean().item(),
        "in_several": (inside > 1).float().mean().item(),
        "neighbours": same.mean().item(),
        "chance": sizes.square().sum(0).mean().item(),
    }


def _told(figures: dict[str, float]) -> str:
    return (
        f"{figures['clusters']} clusters, {figures['neighbours']:.0%} of neighbours together "
        f"(any two: {figures['chance']:.0%}), {figures['in_none']:.0%} of tokens in none"
    )


def _table(name: str, one: Clusters, images: list[str]) -> list[dict[str, Any]]:
    """A row for each image, head and cluster."""
    counts_BMR = (one.members > 0).sum(2).tolist()
    return [
        {"layer": name, "image": image, "head": head, "cluster": cluster, "tokens": tokens}
        for image, of_image in zip(images, counts_BMR, strict=True)
        for head, of_head in enumerate(of_image)
        for cluster, tokens in enumerate(of_head)
    ]


def _picture(found: dict[str, Clusters], seen: Images, number: int) -> Any:
    picture, rows = seen.shown[number], []
    for name, one in found.items():
        labels_MHW, count = labels_of(one)[number].cpu().numpy(), one.members.shape[-1]
        panels = [(coloured(picture, label, count), f"head {head}") for head, label in enumerate(labels_MHW)]
        rows.append([(enlarged(picture), name), *panels])
    return sheet(rows)


def coloured(picture: Image.Image, label_HW: np.ndarray, count: int) -> Image.Image:
    """The picture in grey, its cells in the colours of their labels from 0 to `count` - 1; -1 stays grey."""
    from matplotlib import colormaps

    base = enlarged(picture).convert("L").convert("RGB")
    colours = colormaps["turbo"]((label_HW + 0.5) / count)[..., :3]
    film = Image.fromarray((colours * 255).round().astype(np.uint8)).resize(base.size, Image.Resampling.NEAREST)
    cover = Image.fromarray(((label_HW >= 0) * round(255 * STRENGTH)).astype(np.uint8))
    return Image.composite(film, base, cover.resize(base.size, Image.Resampling.NEAREST))
