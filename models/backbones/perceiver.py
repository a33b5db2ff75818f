"""Perceiver: a few latents read all pixels of the image, again and again, and attend among themselves in between.

Source: Perceiver: General Perception with Iterative Attention, Jaegle et al., ICML 2021, arXiv:2103.03206, section 3.
A round is
    z ← z + read(norm(z), norm(pixels)),   z ← z + mlp(norm(z)),   then blocks of latents, as in a ViT
and all rounds from the second on share their weights. What the classifier is given is norm(mean(z)). The cost is
linear in pixels, and with tied weights the parameters do not depend on the number of rounds.
There is no code of the authors in PyTorch; lucidrains/perceiver-pytorch (commit 96097c6) is followed, whose MLPs are
gated (GEGLU) where the paper has a GELU between two layers: `gated=false`.
Latents have no places on the image: mechanisms that ask for a map are given them in rows, as near to a square as
whole rows allow, whatever the image; there is no pyramid.
Shapes: B = batch, N = latents, C = their channels, S = H·W pixels.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from conf import values
from models.attention import AttentionFactory, Grid, Site, build
from models.backbones.base import Backbone, check_counts, pair
from models.backbones.classifier import classifier, init_weights
from models.layers.activation import geglu
from models.layers.block import Block, Stage, drop_path_rates
from models.layers.cross_block import CrossAttention, CrossBlock
from models.layers.fourier_position import FourierPixels
from models.layers.gated import Carry

EPS = 1e-5


class Perceiver(Backbone):
    """Pixels with their places, `rounds` of reading and latent blocks, the mean of the latents, and a Linear.

    Args:
        attention: factory of the mixers of latents.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size.
        num_classes: outputs of the head; 0 for none.
        latents, dim: how many N, and their channels C.
        rounds: how often the pixels are read.
        blocks: of latents, in each round.
        tied: whether all rounds from the second on share their weights.
        num_heads, head_dim: of the latents' mixers.
        read_heads, read_head_dim: of the cross-attention.
        bands, max_frequency: of the places, see `models.layers.fourier_position.FourierPixels`.
        mlp_ratio, gated: hidden channels of MLPs over C; whether a gate of as many channels multiplies them.
        drop_path, layer_scale: see `Block`; drop path grows linearly over the blocks.

    Raises:
        ValueError: numbers that cannot be, and what mixers refuse.
    """

    undecayed = ("stem.latents",)
    latent = mixes_latents = True

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory],
        image_size: int | Sequence[int],
        num_classes: int,
        *,
        latents: int,
        dim: int,
        rounds: int,
        blocks: int = 1,
        tied: bool = True,
        num_heads: int = 8,
        head_dim: int = 64,
        read_heads: int = 1,
        read_head_dim: int = 64,
        bands: int = 6,
        max_frequency: float = 10.0,
        mlp_ratio: float = 4.0,
        gated: bool = True,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        counts = {"latents": latents, "dim": dim, "rounds": rounds, "blocks": blocks, "num_heads": num_heads}
        heads = {"head_dim": head_dim, "read_heads": read_heads, "read_head_dim": read_head_dim}
        check_counts("Perceiver", **counts, **heads, bands=bands)
        values.number("Perceiver", "max_frequency", max_frequency, 2, fix="set model.max_frequency=10")
        for name, flag in (("tied", tied), ("gated", gated)):
            values.flag("Perceiver", name, flag, fix=f"set model.{name}=true or false")
        pixels, grid = FourierPixels(in_channels, bands, max_frequency), rows_of(latents)
        stages, depth, image = min(rounds, 2) if tied else rounds, 1 + blocks, pair(image_size)
        place = partial(Site, dim, num_heads, grid, depth=depth, kind="vit", head_dim=head_dim, image_size=image)
        mixers = build(attention, [place(stage=s, block=b) for s in range(stages) for b in range(1, depth)])
        rates, mlp = drop_path_rates(drop_path, stages * depth), geglu if gated else Mlp
        made: list[nn.Module] = []
        for number, rate in enumerate(rates):
            given = {"layer_scale": layer_scale, "norm_eps": EPS, "drop_path": rate}
            if number % depth:
                made.append(LatentBlock(dim, mixers[number - number // depth - 1], mlp_ratio=mlp_ratio, **given))
                made[-1].mlp = mlp(dim, int(dim * mlp_ratio))
            else:
                attn = CrossAttention(dim, pixels.dim, read_heads, read_head_dim, qkv_bias=False)
                made.append(Read(attn, mlp(dim, int(dim * mlp_ratio)), **given))
        self.stem = LatentStem(pixels, latents, dim, grid)
        self.stages = nn.ModuleList(Rounds(made[s * depth :][:depth]) for s in range(stages))
        self.stages[-1].times = rounds - stages + 1
        self.norm, self.head_norm = nn.Identity(), self.last_norm(dim)
        self.head = classifier(dim, num_classes)
        self.channels, self.strides, self.grids = [dim] * stages, [], [grid] * stages
        self.apply(init_weights)

    def last_norm(self, dim: int) -> nn.LayerNorm:
        """Behind the mean."""
        return nn.LayerNorm(dim, eps=EPS)

    def pool(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """The mean of the latents, normalised."""
        return self.head_norm(x_BNC.mean(1))


class LatentStem(nn.Module):
    """The latents, the same for every image, their rows, and the pixels that they read."""

    def __init__(self, pixels: FourierPixels, latents: int, dim: int, grid: Grid) -> None:
        super().__init__()
        self.pixels, self.grid = pixels, grid
        self.latents = nn.Parameter(torch.empty(latents, dim))
        nn.init.trunc_normal_(self.latents, std=0.02)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid, Tensor]:
        return self.latents.repeat(images.shape[0], 1, 1), self.grid, self.pixels(images)


class Read(CrossBlock):
    """`CrossBlock` as a block of a stage: `(x_BNC, grid, pixels_BSC) -> (x_BNC, {})`."""

    def forward(self, x_BNC: Tensor, grid: Grid, pixels_BSC: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return super().forward(x_BNC, pixels_BSC), {}


class LatentBlock(Block):
    """`Block` that lets the pixels pass by."""

    def forward(self, x_BNC: Tensor, grid: Grid, pixels_BSC: Tensor, carry: Carry | None = None) -> tuple:
        return super().forward(x_BNC, grid, carry)


class Rounds(Stage):
    """A stage that is gone through `times` times, with the same weights."""

    times = 1

    def forward(self, x_BNC: Tensor, grid: Grid, *given: Tensor, carry: Carry | None = None) -> tuple:
        losses, on = [], carry or {}
        for _ in range(self.times):
            x_BNC, grid, of_round, on = super().forward(x_BNC, grid, *given, carry=on)
            losses += of_round
        return (x_BNC, grid, losses) if carry is None else (x_BNC, grid, losses, on)


def rows_of(latents: int) -> Grid:
    """Whole rows of latents, as near to a square as there are."""
    height = next(side for side in range(math.isqrt(latents), 0, -1) if latents % side == 0)
    return Grid(height, latents // height)
