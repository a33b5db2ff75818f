"""What goes from block to block: handed on, reset between stages, recomputed to the same gradients; gates of blocks."""

import pytest
import torch
from torch import nn

from models.attention import Grid, Mixed, Mixer, Site
from models.layers.adaptive_block import AdaptiveBlock
from models.layers.block import Block, Stage
from models.layers.convnext_block import ConvNeXtBlock
from models.layers.gated import Gated
from models.layers.mbconv import MBConvBlock

GRID = Grid(3, 4)


class Counting(Mixer):
    """Adds up its outputs over the blocks of a stage."""

    carries = True

    def __init__(self, stage: int = 0) -> None:
        super().__init__(Site(8, 2, GRID, stage, 0, 1, "vit"))
        self.linear = nn.Linear(8, 8)

    def forward(self, x, grid, carry=None):
        total = self.linear(x) if carry is None else carry + self.linear(x)
        return Mixed(total, {"total": total.mean()}, total)


class Travelling(Counting):
    carries_across_stages = True


class Plain(Mixer):
    def __init__(self) -> None:
        super().__init__(Site(8, 2, GRID, 0, 0, 1, "vit"))

    def forward(self, x, grid):
        return Mixed(2 * x, {"total": x.mean()})


class Gate(nn.Module):
    """Multiplies by what it gave in the block before, 3 in the first."""

    carries, carries_across_stages, site = True, False, Plain().site

    def forward(self, x, grid, carry=None):
        factor = torch.tensor(3.0) if carry is None else carry + 1
        return Gated(factor * x, {"total": factor}, factor)


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(seed))


def blocks(kind: type, *mixers: type, **options: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [kind(8, mixer(**options)) for mixer in mixers]


@pytest.mark.parametrize("kind", [Block, ConvNeXtBlock])
def test_a_block_hands_on_what_its_mixer_carries(kind):
    first, second = blocks(kind, Counting, Counting)
    x, losses, carry = first(tokens(), GRID, carry={})
    assert torch.equal(x, first(tokens(), GRID)[0]) and list(losses) == ["total"]
    assert [value.shape for value in carry.values()] == [x.shape]
    y, _, _ = second(x, GRID, carry=carry)
    assert not torch.equal(y, second(x, GRID)[0])
    assert torch.equal(Stage([first, second])(tokens(), GRID)[0], y)


def test_other_blocks_are_passed_over():
    first, last = blocks(Block, Counting, Counting)
    with_others = Stage([first, Block(8, Plain()), MBConvBlock(8), last]).eval()
    *_, carry = with_others(tokens(), GRID, carry={})
    assert len(carry) == 1 and len(Stage([Block(8, Plain())])(tokens(), GRID, carry={})[-1]) == 0


@pytest.mark.parametrize("kind", [Counting, Travelling])
def test_it_starts_anew_in_another_stage_unless_it_says_otherwise(kind):
    first, second = (Stage(blocks(Block, kind, stage=stage)) for stage in (0, 1))
    x, grid, _, carry = first(tokens(), GRID, carry={})
    same = torch.equal(second(x, grid, carry=carry)[0], second(x, grid)[0])
    assert same == (not kind.carries_across_stages)
    # a plain ViT is cut into four places to tap, all of one stage
    rest = Stage(blocks(Block, kind, stage=0))
    assert not torch.equal(rest(x, grid, carry=carry)[0], rest(x, grid)[0])


@pytest.mark.parametrize("kind", [Block, ConvNeXtBlock, AdaptiveBlock])
def test_recomputation_gives_the_same_gradients(kind):
    found = []
    for recompute in (False, True):
        stage, x = Stage(blocks(kind, *[Counting] * 3)), tokens().requires_grad_()
        for block in stage.blocks:
            block.gate, block.gate_at = Gate(), "mlp"
            if kind is AdaptiveBlock:
                nn.init.normal_(block.modulation.weight)
        stage.gradient_checkpointing = recompute
        given = [tokens(1)[:, 0]] if kind is AdaptiveBlock else []
        y, _, losses = stage.train()(x, GRID, *given)
        (y.square().mean() + sum(loss["total"] for loss in losses)).backward()
        found.append([x.grad, *(p.grad for p in stage.parameters() if p.grad is not None)])
    assert len(found[0]) > 12 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_gate_of_a_block_stands_where_it_says():
    plain, gated = (blocks(Block, Plain)[0] for _ in range(2))
    gated.gate = Gate()
    x = tokens()
    middle = x + 3 * 2 * plain.norm1(x)
    torch.testing.assert_close(gated(x, GRID)[0], middle + plain.mlp(plain.norm2(middle)))
    gated.gate_at = "mlp"
    middle = x + 2 * plain.norm1(x)
    torch.testing.assert_close(gated(x, GRID)[0], middle + 3 * plain.mlp(plain.norm2(middle)))
    gated.gate_at = "block"
    y, losses = gated(x, GRID)
    torch.testing.assert_close(y, 3 * plain(x, GRID)[0])
    torch.testing.assert_close(losses["total"], 3 + plain.norm1(x).mean())


def test_the_gate_of_a_convnext_block_stands_in_its_one_branch():
    plain, gated = (blocks(ConvNeXtBlock, Plain)[0] for _ in range(2))
    gated.gate, x = Gate(), tokens()
    torch.testing.assert_close(gated(x, GRID)[0], x + plain.scale(plain.mlp(plain.norm(6 * x))))
    gated.gate_at = "mlp"
    torch.testing.assert_close(gated(x, GRID)[0], x + plain.scale(3 * plain.mlp(plain.norm(2 * x))))
    gated.gate_at = "block"
    torch.testing.assert_close(gated(x, GRID)[0], 3 * plain(x, GRID)[0])
