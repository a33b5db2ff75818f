"""Diffusion Transformer: what to take off a noisy map of latents or pixels, given its timestep and its class.

Source: DiT, Peebles & Xie, ICCV 2023, arXiv:2212.09748, with any injected token mixing; heads that differ from block to
block: the code of MoH, Jin et al., ICML 2025, arXiv:2410.11842.
Shapes: B = batch, N = H·W tokens, C = channels, Z = channels of the latents, L = layers with an auxiliary loss.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from conf.errors import UserError
from models.attention import AttentionFactory, Grid, Site, build
from models.backbones.base import Trunk, check_counts, pair, stacked
from models.layers.adaptive_block import AdaptiveBlock, AdaptiveHead
from models.layers.block import Stage
from models.layers.patch_embed import PatchEmbed
from models.layers.sinusoid import FixedPosition, timestep_features

FREQUENCIES = 256  # features of a timestep


class DiT(Trunk):
    """Patches and a fixed position table, `depth` blocks under the condition timestep + class, and back to a map.

    Args:
        attention: factory of the token mixers.
        image_size: pixels, one number or (height, width); a forward pass may bring any size that patches divide.
        num_classes: of the condition; the label `num_classes` stands for no class.
        latent_stride: pixels per side of a latent: 8 for the autoencoder of Stable Diffusion, 1 for pixels themselves.
        in_channels: Z: 4 for that autoencoder, 3 for pixels.
        patch_size: side of a patch in latents.
        dim, depth: channels C, blocks.
        num_heads: heads, a number or a list with one per block.
        head_dim: channels per head; None for C / heads.
        mlp_ratio: see `AdaptiveBlock`.
        class_dropout: share of the labels that training replaces by no class; guidance needs some.
        learn_sigma: predict the variance too: 2·Z channels, those of the noise first.

    Raises:
        ValueError: a size that does not go with another, or a number that is none.
    """

    generates = True
    latent_size: tuple[int, int]  # of the images that it was built for

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory],
        image_size: int | Sequence[int],
        num_classes: int,
        *,
        latent_stride: int = 8,
        in_channels: int = 4,
        patch_size: int = 2,
        dim: int,
        depth: int,
        num_heads: int | Sequence[int],
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        class_dropout: float = 0.1,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        counts = {"latent_stride": latent_stride, "in_channels": in_channels, "patch_size": patch_size}
        counts |= {} if head_dim is None else {"head_dim": head_dim}
        check_counts("DiT", num_classes=num_classes, dim=dim, depth=depth, **counts)
        check_dropout(class_dropout)
        if not mlp_ratio > 0:
            raise UserError(f"DiT: mlp_ratio must be a number above 0, got {mlp_ratio!r}; set model.mlp_ratio")
        self.num_classes, self.class_dropout, self.learn_sigma = num_classes, class_dropout, learn_sigma
        self.latent_stride, self.in_channels, self.patch_size = latent_stride, in_channels, patch_size
        self.latent_size = latent_size(image_size, latent_stride, patch_size)
        grid = Grid(*(side // patch_size for side in self.latent_size))
        heads = heads_of_blocks(num_heads, depth)
        sites = [Site(dim, heads[i], grid, 0, i, depth, "vit", head_dim=head_dim) for i in range(depth)]
        self.stem = ConditionedStem(PatchEmbed(in_channels, dim, patch_size), dim, grid, num_classes)
        self.stages = nn.ModuleList(
            [Stage([AdaptiveBlock(dim, mixer, mlp_ratio) for mixer in build(attention, sites)])]
        )
        self.final = AdaptiveHead(dim, patch_size**2 * in_channels * (1 + learn_sigma))
        self.channels, self.strides = [dim], [latent_stride * patch_size]
        self._init_weights()

    def forward(
        self, latents: Tensor, timesteps: Tensor, labels: Tensor, return_losses: bool = False, drop: bool = True
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Latents (B, Z, H, W), timesteps (B,) and labels (B,) in 0 … num_classes → the prediction (B, Z or 2·Z, H, W).

        With `return_losses` also the auxiliary losses, each stacked over layers (L,). Without `drop` training drops no
        labels, as of a batch whose labels `dropped` has changed.
        """
        self._check(latents, timesteps, labels)
        x_BNC, grid, condition_BC = self.stem(latents, timesteps, self.dropped(labels) if drop else labels)
        x_BNC, grid, losses = self.stages[0](x_BNC, grid, condition_BC)
        prediction = self._to_latents(self.final(x_BNC, condition_BC), grid)
        return (prediction, stacked(losses)) if return_losses else prediction

    def forward_guided(
        self, latents: Tensor, timesteps: Tensor, labels: Tensor, scale: float, channels: int | None = None
    ) -> Tensor:
        """The prediction with classifier-free guidance: without class + scale · (with class − without class).

        Source: Ho & Salimans, 2022, arXiv:2207.12598, with scale 1 for no guidance.

        Args:
            latents, timesteps, labels: as in `forward`, which runs once on twice the batch.
            scale: 1.0 for the conditional prediction.
            channels: how many channels of the noise are guided, None for all; the authors of DiT, and so its published
                figures, guide the first 3 of 4. The other channels and the variance are those of the conditional
                prediction.

        Raises:
            ValueError: the model was made for no dropped labels, so that it knows no prediction without a class.
        """
        if self.class_dropout == 0:
            raise UserError(
                "DiT: guidance needs a prediction without a class, which class_dropout teaches, got class_dropout=0; "
                "set model.class_dropout, or guidance 1"
            )
        twice = (torch.cat([value, value]) for value in (latents, timesteps))
        both = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        given, free = self(*twice, both).chunk(2)
        count = self.in_channels if channels is None else min(channels, self.in_channels)
        guided = free[:, :count] + scale * (given[:, :count] - free[:, :count])
        return torch.cat([guided, given[:, count:]], dim=1)

    def dropped(self, labels_B: Tensor) -> Tensor:
        """In training some labels become the one of no class."""
        if not self.training or not self.class_dropout:
            return labels_B
        drop_B = torch.rand(labels_B.shape, device=labels_B.device) < self.class_dropout
        return labels_B.masked_fill(drop_B, self.num_classes)

    def _to_latents(self, x_BNP: Tensor, grid: Grid) -> Tensor:
        """(B, N, patch · patch · channels) → (B, channels, H, W)."""
        p = self.patch_size
        x = x_BNP.unflatten(2, (p, p, -1)).unflatten(1, grid[:2])
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], x.shape[-1], grid.height * p, grid.width * p)

    def _check(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> None:
        if (
            latents.dim() != 4
            or latents.shape[1] != self.in_channels
            or any(s % self.patch_size for s in latents.shape[2:])
        ):
            raise UserError(
                f"DiT: latents must be (batch, {self.in_channels}, height, width) with sides that patches of "
                f"{self.patch_size} divide, got {tuple(latents.shape)}; see model.in_channels and model.patch_size"
            )
        for name, value in (("timesteps", timesteps), ("labels", labels)):
            if value.shape != latents.shape[:1]:
                raise UserError(
                    f"DiT: {name} must be one number for each of the {len(latents)} latents, got {tuple(value.shape)}; "
                    "give a tensor (batch,)"
                )

    def _init_weights(self) -> None:
        """Xavier for linear layers and patches, small tables and timesteps, zero where a block or the end changes x."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        patches = self.stem.patch_embed.proj
        nn.init.xavier_uniform_(patches.weight.flatten(1))
        nn.init.zeros_(patches.bias)
        for layer in (self.stem.labels, self.stem.timestep[0], self.stem.timestep[2]):
            nn.init.normal_(layer.weight, std=0.02)
        blocks = self.stages[0].blocks
        for layer in (*(block.modulation for block in blocks), self.final.modulation, self.final.linear):
            nn.init.zeros_(layer.weight)


class ConditionedStem(nn.Module):
    """Latents → tokens with their positions; timestep and class → the condition (B, C), through its SiLU."""

    def __init__(self, patch_embed: PatchEmbed, dim: int, grid: Grid, num_classes: int) -> None:
        super().__init__()
        self.patch_embed, self.position = patch_embed, FixedPosition(dim, grid)
        self.timestep = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.labels = nn.Embedding(num_classes + 1, dim)

    def forward(self, latents: Tensor, timesteps_B: Tensor, labels_B: Tensor) -> tuple[Tensor, Grid, Tensor]:
        x_BNC, (height, width) = self.patch_embed(latents)
        features = timestep_features(timesteps_B, FREQUENCIES).to(self.labels.weight.dtype)
        condition_BC = self.timestep(features) + self.labels(labels_B)
        grid = Grid(height, width)
        return self.position(x_BNC, grid), grid, nn.functional.silu(condition_BC)


def latent_size(image_size: int | Sequence[int], latent_stride: int, patch_size: int) -> tuple[int, int]:
    """Height and width of the latents of an image.

    Raises:
        ValueError: they are no whole number of patches.
    """
    sides = pair(image_size)
    if any(side % (latent_stride * patch_size) for side in sides):
        raise UserError(
            f"DiT: image_size must be a multiple of {latent_stride * patch_size} pixels (patches of {patch_size} "
            f"latents, each of {latent_stride} pixels), got {image_size}; change image_size or model.patch_size"
        )
    return sides[0] // latent_stride, sides[1] // latent_stride


def heads_of_blocks(num_heads: int | Sequence[int], depth: int) -> list[int]:
    """Heads of every block, from one number or one per block.

    Raises:
        ValueError: another number of them, or one below 1.
    """
    heads = [num_heads] * depth if isinstance(num_heads, int) else list(num_heads)
    if len(heads) != depth:
        raise UserError(
            f"DiT: num_heads must be one number, or one for each of the {depth} blocks, got {len(heads)}; "
            "set model.num_heads"
        )
    for count in heads:
        check_counts("DiT", num_heads=count)
    return heads


def check_dropout(value: float) -> None:
    """Refuses what is no share of the labels."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"DiT: class_dropout must be in [0, 1), got {value!r}; set model.class_dropout")
