"""Draws where the regions of a BiFormer look: `python docs/pictures.py <checkpoint> <picture>`, of a run on the digits.

$ python train.py model=biformer_32px attention.num_regions=4 run.name=routed
$ python docs/pictures.py outputs/routed/checkpoints/best routes.png
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from data.sources.digits import Digits
from models.attention.biformer import BiLevelRoutingAttention
from models.checkpoints import load_weights, read_config
from models.factory import instantiate

DIGITS, ASKING = (0, 3, 5, 8), (5, 6, 9)  # digits in rows; regions that ask in columns, of 16


def model_of(checkpoint: str) -> nn.Module:
    """The model of a run of ours, with its averaged weights."""
    from omegaconf import OmegaConf

    model = instantiate(OmegaConf.create(read_config(checkpoint))["model"])
    model.load_state_dict(load_weights(checkpoint, ema=True))
    return model.eval()


@torch.no_grad()
def routes_of(model: nn.Module, images: Tensor) -> Tensor:
    """The regions (B, R, K) of the last layer that routes."""
    seen = {}
    layer = [module for module in model.modules() if isinstance(module, BiLevelRoutingAttention)][-1]
    handle = layer.register_forward_hook(lambda module, given, result: seen.update(routes=module.routes(*given[:2])))
    model(images)
    handle.remove()
    return seen["routes"]


def draw(images: np.ndarray, routes_BRK: Tensor, picture: str) -> None:
    """A row per image: the image, then for each region that asks the regions that it attends to."""
    side = int(routes_BRK.shape[1] ** 0.5)
    cell = images.shape[1] // side
    figure, axes = plt.subplots(len(images), len(ASKING) + 1, figsize=(1.6 * (len(ASKING) + 1), 1.6 * len(images)))
    for row, image, routes_RK in zip(axes, images, routes_BRK, strict=True):
        row[0].imshow(image, cmap="gray")
        for axis, region in zip(row[1:], ASKING, strict=True):
            axis.imshow(image, cmap="gray")
            for seen in routes_RK[region].tolist():
                axis.add_patch(_square(seen, side, cell, facecolor="tab:blue", alpha=0.55, linewidth=0))
            axis.add_patch(_square(region, side, cell, fill=False, edgecolor="tab:orange", linewidth=2.5))
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout(pad=0.4)
    figure.savefig(picture, dpi=100)


def _square(region: int, side: int, cell: int, **style: Any) -> Rectangle:
    return Rectangle((region % side * cell - 0.5, region // side * cell - 0.5), cell, cell, **style)


def main(checkpoint: str, picture: str) -> None:
    """Draws the first validation image of each of `DIGITS`."""
    split = Digits().val
    chosen = [split[int(np.flatnonzero(split.labels == digit)[0])][0].resize((32, 32)) for digit in DIGITS]
    images = np.stack([np.asarray(image.convert("L"), np.float32) for image in chosen])
    normal = torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    draw(images, routes_of(model_of(checkpoint), normal), picture)
    print(f"written: {picture}")


if __name__ == "__main__":
    main(*sys.argv[1:])
