"""Deformable downsampling equals the authors' code, and without offsets it is an ordinary convolution."""

import parity
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from models.layers.deformable import DeformableDownsample
from models.layers.grid import Grid
from models.layers.tokens import to_map, to_tokens

NAMES = (("conv.", "dconv."), ("offset.", "dconv.conv_offset."), ("norm.bn.", "norm_layer."))


def test_equals_the_code_of_lit():
    module = DeformableDownsample(16, 32)

    keys = list(module.state_dict())

    def convert(state):
        state = dict(state) | {"norm_layer.num_batches_tracked": torch.tensor(0)}
        theirs = {key: next(key.replace(*pair) for pair in NAMES if key.startswith(pair[0])) for key in keys}
        return {key: state[theirs[key]] for key in keys}

    parity.check("lit/merge__d16_8x8", module, convert, lambda merge, x: merge(x, Grid(8, 8))[0])


def test_starts_as_a_convolution_and_pads_odd_maps():
    module, x = DeformableDownsample(6, 8).eval(), torch.randn(2, 15, 6)
    y, grid = module(x, Grid(3, 5))
    plain = F.conv2d(F.pad(to_map(x, Grid(3, 5)), (0, 1, 0, 1)), module.conv.weight, module.conv.bias, stride=2)
    assert grid == Grid(2, 3)
    torch.testing.assert_close(y, F.gelu(module.norm(to_tokens(plain))), rtol=1e-5, atol=1e-5)


def test_offsets_move_what_is_seen_and_are_trained():
    module, x = DeformableDownsample(6, 8).eval(), torch.randn(1, 16, 6)
    with torch.no_grad():
        module.offset.bias[::2] = 1.0  # rows first: every cell looks one row further down
        moved, _ = module(x, Grid(4, 4))
        module.offset.bias.zero_()
        expected, _ = module(torch.cat([x[:, 4:], torch.zeros(1, 4, 6)], 1), Grid(4, 4))
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-5)
    module(x, Grid(4, 4))[0].square().mean().backward()
    assert module.offset.weight.grad.abs().sum() > 0


def test_counts_as_a_convolution():
    module = DeformableDownsample(6, 8).eval()
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(1, 16, 6), Grid(4, 4))
    assert counter.get_total_flops() == 2 * 4 * 4 * 6 * (8 + 8)  # cells, kernel, channels, outputs and offsets


def test_runs_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = DeformableDownsample(6, 8)(torch.randn(2, 16, 6), Grid(4, 4))
    assert torch.isfinite(y).all()
