"""A reading of dual cross-attention: local tokens ask the whole image, and training shows images beside another one.

Source: Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification, Zhu et al.,
CVPR 2022, arXiv:2205.02151, sections 3.2 to 3.4. There is no code; what is said there:
    rollout   r = the row of the class token in S̄_L … S̄_1 with S̄ = (S + I) / 2 and S the mean over heads of a block,
    GLCA      the R cells with the largest r ask all tokens of the last block, in one block of its own,
    PWCA      softmax(q₁ [k₁; k₂]ᵀ / √D) [v₁; v₂] in all blocks, by their weights, beside another image in training,
    loss      ½ Σ_i (exp(−w_i) CE_i + w_i) over the three, with learned w.
Ours: GLCA classifies by the mean of its R tokens, since a class token that asks in a single block would not see which
cells were chosen; pairs of images are mutual, so that both lie beside each other in one sequence, and of an odd batch
one image is beside itself. Evaluation answers with the logarithm of the mean probability of the two branches that
remain. The task adds its own cross entropy of the first branch, so the loss `dcal` is what the sum has besides it.
Shapes: B = batch, N = tokens, C = channels, M = heads, R = chosen cells, K = classes.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from conf import values
from conf.errors import UserError
from models.layers.block import Block, recomputed
from models.layers.class_attention import ClassAttention
from models.layers.grid import Grid
from models.layers.wrapped import Passed, Wrapper

WHO = "dcal"


class DCAL(Wrapper):
    """Around a plain ViT with a class token, whose weights and names stay as they are.

    Args:
        model: the ViT.
        share: R over the cells of the map, rounded up: 0.1 for fine-grained classes, 0.3 for re-identification.
        pairs: whether training has the branch with pairs.

    Raises:
        ValueError: an option out of range, or a model of another kind.
    """

    learns_from_labels = True

    def __init__(self, model: nn.Module, *, share: float = 0.1, pairs: bool = True) -> None:
        super().__init__()
        if not values.is_number(share, 0, 1) or share == 0:
            values.refuse(WHO, "share", "above 0 and at most 1", share, "set wrapper.share")
        values.flag(WHO, "pairs", pairs, fix="set wrapper.pairs=true or false")
        block = check_model(model)
        self.share, self.pairs, dim = share, pairs, block.attn.site.dim
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), ClassAttention(dim, block.attn.site.num_heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, 4 * dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, model.num_classes) if model.num_classes else None
        self.uncertainty = nn.Parameter(torch.zeros(2 + pairs))
        for part in (*self.attn.children(), self.mlp.fc1, self.mlp.fc2, *([self.head] if self.head else [])):
            nn.init.trunc_normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor | None = None) -> Passed:
        """In front of the maps of the stages: what GLCA makes of the chosen cells, and of PWCA the last tokens."""
        x, grid = model.stem(images)
        maps, losses, seen_BN = self._followed(model, x, grid)
        last = maps[-1][0]
        local = self.local(last, self.chosen(seen_BN, grid)), Grid(1, math.ceil(self.share * grid.cells))
        if not (self.training and self.pairs):
            return [local, *maps], losses
        beside = self.beside(model, x, grid)
        return [(beside, grid), local, *maps], losses

    def answer(self, model: nn.Module, maps: list[tuple[Tensor, Grid]], labels: Tensor | None) -> tuple[Tensor, dict]:
        own, losses = super().answer(model, maps, labels)
        if self.head is None:
            return own, losses
        branch = 1 if self.training and self.pairs else 0
        local = self.head(self.norm(maps[branch][0]).mean(1))
        if not self.training:
            return (own.float().softmax(-1) + local.float().softmax(-1)).div(2).log().to(own.dtype), losses
        if labels is None:
            return own, losses
        branches = [own, local] + ([model.classify(*model.finished(*maps[0]))] if self.pairs else [])
        entropies = torch.stack([F.cross_entropy(logits.float(), labels) for logits in branches])
        total = (entropies * (-self.uncertainty).exp() + self.uncertainty).sum() / 2
        return own, losses | {"dcal": (total - entropies[0])[None]}

    def chosen(self, seen_BN: Tensor, grid: Grid) -> Tensor:
        """(B, R): the cells that the class token depends on most."""
        return seen_BN[:, grid.prefix :].topk(math.ceil(self.share * grid.cells), dim=1).indices + grid.prefix

    def local(self, x_BNC: Tensor, index_BR: Tensor) -> Tensor:
        """GLCA: the chosen tokens after a block in which they ask all."""
        where = index_BR.unsqueeze(-1).expand(-1, -1, x_BNC.shape[-1])
        y_BNC = self.norm1(x_BNC)
        x_BRC = x_BNC.gather(1, where) + self.attn(y_BNC, y_BNC.gather(1, where))
        return x_BRC + self.mlp(self.norm2(x_BRC))

    def beside(self, model: nn.Module, x_BNC: Tensor, grid: Grid) -> Tensor:
        """PWCA: all blocks, where every image sees its own tokens and those of a random other one."""
        B, N, C = x_BNC.shape
        order = torch.randperm(B, device=x_BNC.device)
        order = torch.cat([order, order[-1:]]) if B % 2 else order
        pairs = x_BNC[order].reshape(-1, 2 * N, C)
        for stage in model.stages:
            pairs, *_ = stage(pairs, Grid(1, 2 * N - grid.prefix, grid.prefix))
        return pairs.reshape(-1, N, C)[:B][order[:B].argsort()]

    def _followed(self, model: nn.Module, x: Tensor, grid: Grid) -> tuple[list, list[dict[str, Tensor]], Tensor]:
        """The plain pass, and how much of every token the class token has in the end, (B, N), by rollout."""
        maps, losses, mixed = [], [], []
        for stage in model.stages:
            for block in stage.blocks:
                with torch.no_grad():
                    mixed.append(block.attn.attention_matrix(block.norm1(x), grid).mean(1))
                run = partial(recomputed, block) if stage.gradient_checkpointing and self.training else block
                x, loss = run(x, grid)
                losses.append(loss)
            maps.append((x, grid))
        class_B1 = torch.ones_like(mixed[-1][:, 0, :1])
        seen_BN = F.pad(class_B1, (0, x.shape[1] - 1))
        for S_BNN in reversed(mixed):
            seen_BN = (seen_BN + (seen_BN.unsqueeze(1) @ S_BNN).squeeze(1)) / 2
        return maps, losses, seen_BN


def check_model(model: nn.Module) -> Block:
    """A block of the model, which must be a plain ViT whose blocks mix tokens by shares, wherever these stand."""
    who, whole = type(model).__name__, not model.latent and len(set(model.strides)) == 1 and model.reducers is None
    blocks = [block for stage in model.stages for block in stage.blocks]
    if not whole or not all(map(_is_plain, blocks)) or any(stage.downsample is not None for stage in model.stages):
        raise UserError(
            f"{WHO}: it follows the blocks of a plain ViT without gates, positions in blocks and reducer, got {who}; "
            "choose a vit model and leave gate= and reducer= out"
        )
    if not model.grids[-1].prefix or (model.pooling is not None and model.pooling.reads_map):
        raise UserError(
            f"{WHO}: it chooses cells by what the class token depends on, got a {who} that classifies by the map; set "
            "model.class_token=true and leave pool= out"
        )
    for block in blocks:
        attn = block.attn
        if attn.carries or not (attn.has_matrix and attn.row_stochastic and attn.ignores_grid):
            raise UserError(
                f"{WHO}: it needs the shares of all pairs of tokens, and tokens of two images in one sequence, got "
                f"{type(attn).__name__}; set attention=softmax without layout, bias and factor"
            )
    return blocks[0]


def _is_plain(block: nn.Module) -> bool:
    if not isinstance(block, Block) or block.post_norm or block.branch_norm:
        return False
    return block.gate is None and block.position is None and block.mlp_position is None and not block.mlp_kernel
