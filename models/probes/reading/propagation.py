"""Relevance of a class, backwards through a softmax ViT from its logit to the pixels, and what it makes of attention.

Source: Chefer et al., Transformer Interpretability Beyond Attention Visualization, CVPR 2021, arXiv:2012.09838; code
hila-chefer/Transformer-Explainability; the rules of single operations stand in `models.probes.reading.relprop`.
Shapes: B = batch, N = prefix + H·W tokens, C = channels, M = heads, K = classes, D = channels per head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from conf.errors import UserError
from models.attention.contract import Grid
from models.attention.contract.heads import merge_heads, split_heads
from models.attention.contract.layout import Layout
from models.attention.explain import explained
from models.attention.multihead import MultiHead
from models.attention.softmax import SoftmaxCore
from models.backbones.vit import ViT
from models.probes.reading import relprop


class Relevance(NamedTuple):
    """Where the relevance of one class went.

    matrices: of the attention matrix of each block, (B, M, N, N), the first block first. gradients: of the logit by
    these. pixels: (B, H, W), summed over channels. sums: (B, blocks), all relevance that reaches the input of a block.
    grid: the map of the tokens.
    """

    matrices: list[Tensor]
    gradients: list[Tensor]
    pixels: Tensor
    sums: Tensor
    grid: Grid


def check_propagates(who: str, model: nn.Module) -> None:
    """Refuses a model with a part that has no rule here.

    Raises:
        UserError: naming it.
    """
    found = f"{type(model).__name__}" if not isinstance(model, ViT) else next(_without_rule(model), None)
    if found is not None:
        raise UserError(
            f"{who}: relevance has rules for a ViT with softmax attention over the whole map alone, got {found}; "
            "choose probe=relevance or probe=gradcam"
        )


def _without_rule(model: ViT) -> Iterator[str]:
    if model.pooling is not None:
        yield f"pool {type(model.pooling).__name__}"
    if not isinstance(model.head, nn.Linear):
        yield f"head {type(model.head).__name__}"
    if model.reducers is not None:
        yield "a reducer of tokens"
    if model.wrapper is not None:
        yield f"wrapper {type(model.wrapper).__name__}"
    for s, stage in enumerate(model.stages):
        for b, block in enumerate(stage.blocks):
            parts = [part for part in (_part_of_block(block), *_parts_of_attention(block.attn)) if part]
            yield from (f"{part} in stages.{s}.blocks.{b}" for part in parts)


def _part_of_block(block: nn.Module) -> str | None:
    if block.gate is not None:
        return f"gate {type(block.gate).__name__}"
    if block.wiring != "sequential":
        return f"wiring={block.wiring}"
    return None if type(block.mlp) is Mlp else f"MLP {type(block.mlp).__name__}"


def _parts_of_attention(attn: nn.Module) -> Iterator[str]:
    """What stands beside or in the place of softmax(q kᵀ) v."""
    if type(attn) is not MultiHead:
        yield type(attn).__name__
        return
    core = attn.core
    if type(core) is not SoftmaxCore:
        yield type(core).__name__
        return
    if type(attn.layout) is not Layout:
        yield f"layout {type(attn.layout).__name__}"
    if not isinstance(core.q_norm, nn.Identity):
        yield "qk_norm"
    for part in (attn.pre, attn.transform, attn.value, core.score, core.bias, core.weights, core.factor, core.lepe):
        if part is not None:
            yield type(part).__name__


def propagate(model: ViT, images_BCHW: Tensor, targets_B: Tensor, coupled: bool = False) -> Relevance:
    """Relevance 1 of each image's class, backwards from the logit to the pixels.

    Args:
        model: one that `check_propagates` takes, in evaluation mode.
        images_BCHW: as the model takes them.
        targets_B: the class of each.
        coupled: divide by sums over the batch, as the authors' code does.
    """
    blocks = [block for stage in model.stages for block in stage.blocks]
    with torch.enable_grad(), explained(model) as matrices, noted(model) as calls:
        logits_BK = model(images_BCHW.detach().requires_grad_())
    chosen = logits_BK.gather(1, targets_B[:, None]).sum()
    weights = [noted_matrix for (noted_matrix,) in matrices.values()]
    gradients = torch.autograd.grad(chosen, weights)
    with torch.no_grad():
        relevance = torch.zeros_like(logits_BK).scatter(1, targets_B[:, None], 1.0)
        relevance = _of_tokens(model, calls, relprop.linear(calls[model.head][0], model.head.weight, relevance))
        found, sums = [], []
        for block, matrix in zip(reversed(blocks), reversed(weights), strict=True):
            relevance, of_matrix = _through_block(block, calls, matrix, relevance, coupled)
            found.insert(0, of_matrix)
            sums.insert(0, relevance.flatten(1).sum(1))
        pixels = _of_pixels(model, calls, relevance, coupled)
    height, width = images_BCHW.shape[2:]
    grid = Grid(*calls[model.stem.patch_embed.proj][1].shape[2:], model.stem.prefix)
    return Relevance(found, list(gradients), pixels[:, :height, :width], torch.stack(sums, 1), grid)


def attribution_map(relevance: Relevance, start: int = 0) -> Tensor:
    """(B, N, N): the product over blocks of I + mean over heads of (gradient ∘ relevance)⁺; equations 13 and 14.

    Args:
        relevance: what `propagate` found.
        start: the block that it begins with.
    """
    joint = None
    for matrix, gradient in list(zip(relevance.matrices, relevance.gradients, strict=True))[start:]:
        weighed = (gradient * matrix).clamp(min=0).mean(1)
        step = weighed + torch.eye(weighed.shape[-1], device=weighed.device, dtype=weighed.dtype)
        joint = step if joint is None else step @ joint
    return joint


def of_cells(relevance: Relevance, of_tokens_BNN: Tensor) -> Tensor:
    """(B, Y, X): what such a matrix has of the map for the class token, or for the mean of the tokens without one."""
    prefix = relevance.grid.prefix
    read_BN = of_tokens_BNN[:, 0] if prefix else of_tokens_BNN.mean(1)
    return read_BN[:, prefix:].unflatten(1, relevance.grid[:2])


def last_layer_map(relevance: Relevance) -> Tensor:
    """(B, N, N): the positive relevance of the last attention matrix, mean over heads."""
    return relevance.matrices[-1].clamp(min=0).mean(1)


Calls = dict[nn.Module, tuple[Tensor, Tensor]]


@contextmanager
def noted(model: nn.Module) -> Iterator[Calls]:
    """Inside, forward passes note what every module was given first, and what it gave, where these are tensors."""
    calls: Calls = {}

    def note(module: nn.Module, given: tuple, result: object) -> None:
        if given and isinstance(given[0], Tensor):
            x = getattr(result, "x", result)
            calls[module] = (given[0].detach(), x.detach() if isinstance(x, Tensor) else x)

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _of_tokens(model: ViT, calls: Calls, relevance_BC: Tensor) -> Tensor:
    """(B, N, C) behind the last block: all to the class token, or to the tokens by what each adds to their mean."""
    x_BNC = calls[model.norm][1]
    if not model.grids[0].prefix:
        return relprop.mean(x_BNC, relevance_BC)
    relevance_BNC = torch.zeros_like(x_BNC)
    relevance_BNC[:, 0] = relevance_BC
    return relevance_BNC


def _through_block(
    block: nn.Module, calls: Calls, matrix: Tensor, relevance: Tensor, coupled: bool
) -> tuple[Tensor, Tensor]:
    """In front of a block, and of its attention matrix."""
    between, mlp = calls[block.norm2][0], block.mlp
    kept, branch = relprop.added(between, calls[block.scale2][1], relevance, coupled)
    branch = relprop.linear(calls[mlp.fc2][0], mlp.fc2.weight, branch)
    relevance = kept + relprop.linear(calls[mlp.fc1][0], mlp.fc1.weight, branch)
    kept, branch = relprop.added(calls[block.norm1][0], calls[block.scale1][1], relevance, coupled)
    branch, of_matrix = _through_attention(block.attn, calls, matrix, branch)
    return kept + branch, of_matrix


def _through_attention(attn: nn.Module, calls: Calls, matrix: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """In front of the projection to queries, keys and values, and of the matrix."""
    x_BNC, qkv = calls[attn.qkv]
    q, k, v = split_heads(qkv, 3, attn.num_heads)
    relevance = relprop.linear(calls[attn.proj][0], attn.proj.weight, relevance)
    of_matrix, of_v = relprop.product(matrix, v, split_heads(relevance, 1, attn.num_heads)[0])
    of_q, of_k = relprop.product(q, k.mT, of_matrix)
    of_qkv = torch.cat([merge_heads(part) for part in (of_q, of_k.mT, of_v)], dim=-1)
    return relprop.linear(x_BNC, attn.qkv.weight, of_qkv), of_matrix


def _of_pixels(model: ViT, calls: Calls, relevance_BNC: Tensor, coupled: bool) -> Tensor:
    """(B, H, W), by the patches; the class token's relevance and that of the positions ends here."""
    stem = model.stem
    x_BNC, placed = calls[stem.position]
    table = placed[:1] - x_BNC[:1]
    relevance, _ = relprop.added(x_BNC, table.expand_as(x_BNC), relevance_BNC, coupled)
    patches = stem.patch_embed.proj
    images, maps = calls[patches]
    of_map = relevance[:, stem.prefix :].mT.unflatten(2, maps.shape[2:])
    return relprop.pixels(images, patches, of_map)
