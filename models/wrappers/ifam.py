"""iFAM: a first ViT finds the parts of an object, and a second one of its kind sees nothing but them.

Source: Inherently Faithful Attention Maps for Vision Transformers, Aniraj et al., 2025, arXiv:2506.08915, section 3;
code: ananthu-aniraj/ifam at commit bc8eeae; the first stage is PDiscoFormer's, Aniraj et al., ECCV 2024,
arXiv:2407.04538. With the tokens x of the first and prototypes w of K parts and the background:
    a = softmax_k(−‖x − w_k‖² / T),   open where max over parts of a > a of the background.
The second closes all other cells as keys, so that its class token depends on open ones alone. In training a has Gumbel
noise where cells are opened, and parts are left out at random; losses: see `models.wrappers.part_losses`, and `parts`,
the cross entropy of the first stage, which classifies by the mean over its parts. Behind hard masks no gradient goes
from the second stage to the first. The authors draw the noise in evaluation too, here it is none; their loss of
orthogonality compares channels where the paper compares parts, as here; they drop closed cells of a batch, which
changes no result.
Shapes: B = batch, N = H·W cells, C = channels, K = parts, J = K + 1 with the background last.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from conf.errors import UserError
from models.layers.block import Block
from models.layers.gated import OPEN
from models.layers.grid import Grid
from models.layers.wrapped import Passed, Wrapper
from models.wrappers.part_losses import equivariance, losses_of_parts

MASKS = ("hard", "soft")
WHO = "ifam"


class Parts(NamedTuple):
    """What the first stage finds."""

    maps: Tensor  # (B, J, H, W), sums to one over J; the background is the last
    open: Tensor  # (B, H·W), bool; of soft masks the share of the strongest part
    features: Tensor  # (B, J, C), of every part
    losses: list[dict[str, Tensor]]  # of the blocks of the first stage


class IFAM(Wrapper):
    """The model is the second stage; the first, `first`, starts as a copy of it without its head.

    A mixer that cannot close keys (`closes_keys`) sees closed cells as zeros instead, which it learns as little from.

    Args:
        model: a plain ViT with a class token.
        parts: K.
        temperature: T.
        part_dropout: share of the parts that training leaves out, both where the first stage classifies and of masks.
        mask: "hard", or "soft" for log(a + 1e-10) added to the logits of the second stage.
        equivariance: a further pass of the first stage in training, over turned images, for the loss of that name.

    Raises:
        ValueError: an option out of range, or a model of another kind.
    """

    learns_from_labels = True

    def __init__(
        self,
        model: nn.Module,
        *,
        parts: int = 8,
        temperature: float = 1.0,
        part_dropout: float = 0.3,
        mask: str = "hard",
        equivariance: bool = True,
    ) -> None:
        super().__init__()
        values.whole(WHO, "parts", parts, fix="set wrapper.parts")
        if not values.is_number(temperature) or temperature <= 0:
            values.refuse(WHO, "temperature", "a positive number", temperature, "set wrapper.temperature")
        if not values.is_number(part_dropout, 0, 1) or part_dropout == 1:
            values.refuse(WHO, "part_dropout", "at least 0 and below 1", part_dropout, "set wrapper.part_dropout")
        values.choice(WHO, "mask", mask, MASKS, fix="set wrapper.mask")
        values.flag(WHO, "equivariance", equivariance, fix="set wrapper.equivariance=true or false")
        check_model(model, mask)
        self.parts, self.temperature, self.dropout = parts, temperature, part_dropout
        self.mask, self.equivariant = mask, equivariance
        self.first = copy.deepcopy(model)
        self.first.head, self.first.pooling = nn.Identity(), None
        dim = model.channels[-1]
        self.prototypes = nn.Linear(dim, parts + 1, bias=False)
        self.modulation = nn.LayerNorm([dim, parts + 1])
        self.head = nn.Linear(dim, model.num_classes, bias=False) if model.num_classes else None
        if self.head is not None:
            nn.init.trunc_normal_(self.head.weight, std=0.02)

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor | None = None) -> Passed:
        found = self.find(images)
        maps, losses = model.through(images, {OPEN: found.open})
        if not self.training:
            return maps, losses + found.losses
        own = losses_of_parts(found.maps, found.features)
        if self.equivariant:
            own["equivariance"] = equivariance(images, found.maps, lambda turned: self.find(turned).maps)
        if labels is not None and self.head is not None:
            own["parts"] = F.cross_entropy(self._logits(found.features).float(), labels)
        return maps, [*losses, *found.losses, own]

    def find(self, images: Tensor) -> Parts:
        """Maps of the parts, and which cells the second stage may see."""
        passed, losses = self.first.through(images)
        tokens, grid = self.first.finished(*passed[-1])
        x_BNC = tokens[:, grid.prefix :]
        logits_BNJ = self._logits_of_parts(x_BNC)
        maps_BNJ = (logits_BNJ / self.temperature).softmax(-1)
        features_BCJ = x_BNC.mT @ maps_BNJ.to(x_BNC.dtype) / grid.cells
        features_BJC = self.modulation(features_BCJ).mT
        return Parts(_on_map(maps_BNJ, grid), self._open(logits_BNJ), features_BJC, losses)

    def _logits_of_parts(self, x_BNC: Tensor) -> Tensor:
        """Squared distances to the prototypes, with a minus sign, in float32."""
        with torch.autocast(x_BNC.device.type, enabled=False):
            x, w = x_BNC.float(), self.prototypes.weight.float()
            return 2 * x @ w.mT - x.square().sum(-1, keepdim=True) - w.square().sum(-1)

    def _open(self, logits_BNJ: Tensor) -> Tensor:
        if self.training:
            uniform = torch.rand_like(logits_BNJ).clamp_min(torch.finfo(logits_BNJ.dtype).tiny)
            logits_BNJ = logits_BNJ - (-uniform.log()).log()
        shares_BNJ = (logits_BNJ / self.temperature).softmax(-1)
        of_parts_BNK = self._some(shares_BNJ[..., :-1].mT).mT
        strongest_BN = of_parts_BNK.amax(-1)
        return strongest_BN if self.mask == "soft" else strongest_BN >= shares_BNJ[..., -1]

    def _logits(self, features_BJC: Tensor) -> Tensor:
        """Of the first stage: the mean of what every part alone says."""
        kept_BKC = self._some(features_BJC[:, :-1])
        return self.head(kept_BKC / (1 - self.dropout) if self.training else kept_BKC).mean(1)

    def _some(self, x_BKX: Tensor) -> Tensor:
        """In training without some of the parts."""
        if not self.training:
            return x_BKX
        kept_BK1 = torch.rand(*x_BKX.shape[:2], 1, device=x_BKX.device) >= self.dropout
        return x_BKX * kept_BK1


def _on_map(maps_BNJ: Tensor, grid: Grid) -> Tensor:
    return maps_BNJ.mT.unflatten(2, grid[:2])


def check_model(model: nn.Module, mask: str) -> None:
    """Refuses a model that cannot be the second stage."""
    who = type(model).__name__
    blocks = [block for stage in model.stages for block in stage.blocks]
    if model.latent or len(set(model.strides)) > 1 or not all(isinstance(block, Block) for block in blocks):
        raise UserError(f"{WHO}: both stages are plain ViTs, got {who}; choose a vit model")
    if getattr(model, "reducers", None) is not None or getattr(model, "class_stage", None) is not None:
        raise UserError(
            f"{WHO}: its masks are for all cells of the map and all blocks, got a {who} with a reducer or class "
            "attention; leave reducer= out, or choose a vit model"
        )
    pooling = model.pooling
    if not model.grids[-1].prefix or (pooling is not None and pooling.reads_map):
        what = "the mean of the map" if pooling is None else type(pooling).__name__
        raise UserError(
            f"{WHO}: it classifies by a class token, which sees open cells alone, got {what}; set "
            "model.class_token=true and leave pool= out"
        )
    without = [block.attn for block in blocks if not block.attn.closes_keys]
    if mask == "soft" and without:
        raise UserError(
            f"{WHO}: a soft mask is added to the logits of keys, which {type(without[0]).__name__} has not; set "
            "wrapper.mask=hard, or attention=softmax"
        )
