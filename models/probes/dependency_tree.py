"""On which token each token depends, as reversed attention has it: an arrow from every token to its parent.

Source: Visual Dependency Transformers, Ding et al., CVPR 2023, arXiv:2304.03282, section 3. Of a layer, token j sends
to token i with the weight Σ_heads A_ji p_j m_j; its parent is the one it sends most to, and a token that keeps most for
itself is a root. Leaves are pruned by m, how much they still have to say: the leaf with the least goes first.
Shapes: B = images, N = H·W tokens.
"""

from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from models.attention.contract import Grid, Mixer
from models.attention.gating import ungated
from models.attention.recording import Call, recorded
from models.attention.reversed import ReversedAttention
from models.backbones.base import check_places
from models.probes import Report
from models.probes.drawing.overlays import arrows, overlay, sheet
from models.probes.reading.images import Images, first_images
from models.probes.reading.layers import chosen_layers

WHO = "dependency_tree"


class Tree(NamedTuple):
    """Of one layer: the parent of each token and m, (B, N) each; the token itself where it is a root."""

    parent: Tensor
    message: Tensor
    grid: Grid


def dependency_tree(
    model: nn.Module,
    data: pl.LightningDataModule,
    trainer: pl.Trainer,
    input: Any = None,
    images: int = 4,
    layers: Any = "all",
) -> Report:
    """A picture for each image: a row for each layer, with its arrows and the messages that are left.

    Args:
        model, data, trainer, input: see `models.probes`.
        images: how many pictures.
        layers: which layers; see `models.probes.reading.layers.chosen_layers`.

    Raises:
        UserError: an option that has no meaning, or a model or layer without reversed attention.
    """
    check_places(model, WHO)
    mixers = chosen_layers(WHO, model, layers, is_reversed, "dependencies", "attention=reversed")
    seen = first_images(data, images, trainer.strategy.root_device)
    with torch.no_grad(), recorded(model) as calls:
        model(seen.batch)
    found = {name: tree_of(ungated(mixer), calls[name]) for name, mixer in mixers.items()}
    figures = {name: summed(tree) for name, tree in found.items()}
    said = (
        "an arrow from every token to the one that it depends on, roots as rings; and how much of its message is left"
    )
    return Report(
        {f"{name}/{what}": value for name, one in figures.items() for what, value in one.items()},
        rows={name: _told(one) for name, one in figures.items()},
        tables={"tokens": [row for name, tree in found.items() for row in _table(name, tree, seen.names)]},
        pictures={name: _picture(found, seen, i) for i, name in enumerate(seen.names)},
        captions={name: f"{name}: {said}" for name in seen.names},
    )


def is_reversed(mixer: Mixer) -> bool:
    """Whether its tokens send to those that they depend on."""
    return isinstance(ungated(mixer), ReversedAttention)


@torch.no_grad()
def tree_of(mixer: ReversedAttention, call: Call) -> Tree:
    """Of a layer that was called so."""
    sent_BNN = mixer.attention_matrix(*call, **call.named).sum(1)  # of every receiver from every sender
    return Tree(sent_BNN.argmax(1), mixer.messages(call.x_BNC, call.carry).squeeze(-1), call.grid)


def pruned(parent_N: list[int], message_N: list[float]) -> list[int]:
    """Tokens in the order in which they go: of the leaves the one with the least message, of equals the first.

    Where tokens depend on each other in a circle there is no leaf, and the least of those that are left goes.
    """
    left, children = set(range(len(parent_N))), [0] * len(parent_N)
    for token, parent in enumerate(parent_N):
        children[parent] += parent != token
    order: list[int] = []
    while left:
        leaves = [token for token in left if children[token] == 0] or left
        gone = min(leaves, key=lambda token: (message_N[token], token))
        left.remove(gone)
        order.append(gone)
        if parent_N[gone] != gone:
            children[parent_N[gone]] -= 1
    return order


def summed(tree: Tree) -> dict[str, float]:
    """Shares of tokens that are roots, leaves, and on the way into a circle; the mean way to a root, in steps; m."""
    own = torch.arange(tree.parent.shape[1], device=tree.parent.device).expand_as(tree.parent)
    roots, at, steps = tree.parent == own, own, torch.zeros_like(own)
    for _ in range(tree.parent.shape[1]):  # a way without a circle is no longer
        moved = tree.parent.gather(1, at)
        steps, at = steps + (moved != at), moved
    reach = roots.gather(1, at)
    return {
        "roots": roots.float().mean().item(),
        "leaves": (~_parents(tree)).float().mean().item(),
        "in_circles": (~reach).float().mean().item(),
        "steps": (steps * reach).sum().item() / max(int(reach.sum()), 1),
        "message": tree.message.mean().item(),
    }


def _parents(tree: Tree) -> Tensor:
    """Which tokens others depend on, (B, N)."""
    N = tree.parent.shape[1]
    own = torch.arange(N, device=tree.parent.device)
    others_BNN = (tree.parent.unsqueeze(-1) == own) & (own[:, None] != own)
    return others_BNN.any(1)


def _told(figures: dict[str, float]) -> str:
    return (
        f"{figures['roots']:.0%} of tokens are roots, {figures['leaves']:.0%} leaves, {figures['in_circles']:.0%} lead "
        f"into a circle; {figures['steps']:.1f} steps to a root; message {figures['message']:.2f}"
    )


def _table(name: str, tree: Tree, images: list[str]) -> list[dict[str, Any]]:
    """A row for each image and token; `pruned` is when it goes, from 0."""
    rows = []
    for image, parents, messages in zip(images, tree.parent.tolist(), tree.message.tolist(), strict=True):
        turn = {token: number for number, token in enumerate(pruned(parents, messages))}
        for token, (parent, message) in enumerate(zip(parents, messages, strict=True)):
            own = {"layer": name, "image": image, "token": token, "parent": parent}
            rows.append(own | {"message": message, "pruned": turn[token]})
    return rows


def _picture(found: dict[str, Tree], seen: Images, number: int) -> Any:
    picture, rows = seen.shown[number], []
    for name, tree in found.items():
        drawn = arrows(picture, tree.parent[number].tolist(), tree.grid[:2])
        rows.append([(drawn, name), (overlay(picture, tree.message[number].view(tree.grid[:2])), "message")])
    return sheet(rows)
