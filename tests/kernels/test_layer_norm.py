"""What is particular to the norms that save a pass over memory."""

import pytest
import torch
from torch.nn import functional as F

from kernels.depthwise_conv import depthwise_conv
from kernels.layer_norm import conv_norm
from kernels.layer_norm.cases import OPERATION, conv_inputs

conv_reference = OPERATION.reference


def test_is_a_convolution_and_a_norm():
    given = conv_inputs("cpu", torch.float32, batch=1, grid=(5, 6, 1), dim=40, kernel=5)
    y, n = conv_norm(**given)
    wanted = depthwise_conv(
        given["x_BNC"], (5, 6, 1), given["conv_weight"], given["conv_bias"], residual=given["x_BNC"]
    )
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(n, F.layer_norm(wanted, (40,), given["norm_weight"], given["norm_bias"], 1e-6))


def test_without_a_convolution_y_is_x():
    given = conv_inputs("cpu", torch.bfloat16, batch=1, grid=(4, 3, 2), dim=24, bias=False)
    y, _ = conv_norm(**{**given, "conv_weight": torch.zeros(24, 1, 3, 3)})
    assert torch.equal(y, given["x_BNC"])


def test_one_gradient_for_both_results(poisoned):
    """Autograd hands the same tensor twice where both results are used alike."""
    given = conv_inputs("cpu", torch.float32, batch=1, grid=(4, 3), dim=24)
    along = torch.ones_like(given["x_BNC"])
    found, wanted = (
        torch.autograd.grad(function(**given), given["x_BNC"], [along, along])[0]
        for function in (conv_norm, conv_reference)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_autocast_leaves_the_sum_as_precise_as_x():
    given = conv_inputs("cpu", torch.float32, batch=1, grid=(4, 3), dim=24)
    with torch.autocast("cpu", torch.bfloat16):
        y, n = conv_norm(**given)
    assert y.dtype == torch.float32 and n.dtype == torch.bfloat16
    torch.testing.assert_close(y, conv_reference(**given)[0])
    (y.sum() + n.float().sum()).backward()
    assert given["x_BNC"].grad.dtype == torch.float32


@pytest.mark.parametrize("size", [(1, 1), (2, 33), (13, 1)], ids=str)
def test_any_map(size, poisoned):
    given = conv_inputs("cpu", torch.float32, batch=1, grid=size, dim=8)
    for found, wanted in zip(conv_norm(**given), conv_reference(**given), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (4, 5)}, r"conv_norm: x must be \(B, 0 \+ 4\*5, C\), got \(1, 16, 8\); pass the grid of this map"),
        (
            {"conv_weight": torch.zeros(8, 1, 4, 4)},
            r"conv_weight must be \(8, 1, k, k\) with odd k, got \(8, 1, 4, 4\)",
        ),
        ({"conv_weight": torch.zeros(8, 1, 9, 9)}, r"the kernels go up to 7x7 weights, got 9; use backend=torch"),
        ({"conv_bias": torch.zeros(4)}, r"conv_bias must be \(8,\), got \(4,\); see nn.Conv2d"),
        ({"norm_weight": torch.zeros(4)}, r"norm_weight must be \(8,\), got \(4,\); give one number per channel"),
        ({"norm_bias": torch.zeros(4)}, r"norm_bias must be \(8,\), got \(4,\); give one number per channel"),
    ],
)
def test_conv_norm_refuses(change, message):
    given = conv_inputs("cpu", torch.float32, batch=1, grid=(4, 4), dim=8)
    with pytest.raises(ValueError, match=message):
        conv_norm(**{**given, **change})


def test_refuses_more_channels_than_a_program_holds():
    given = conv_inputs("cpu", torch.float32, batch=1, grid=(1, 1), dim=1032)
    with pytest.raises(ValueError, match=r"the kernels take at most 1024 channels, got 1032; use backend=torch"):
        conv_norm(**given)
