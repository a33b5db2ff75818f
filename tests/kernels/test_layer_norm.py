"""What is particular to the norms that save a pass over memory."""

import pytest
import torch
from torch.nn import functional as F

from kernels.depthwise_conv import depthwise_conv
from kernels.layer_norm import conv_norm, conv_reference, pooled_norm, pooled_reference
from kernels.layer_norm.cases import conv_inputs, pooled_inputs


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


@pytest.mark.parametrize(("size", "region"), [((1, 1), (1, 1)), ((2, 33), (2, 8)), ((13, 1), (5, 3))], ids=str)
def test_any_region(size, region, poisoned):
    given = pooled_inputs("cpu", torch.float32, batch=1, grid=size, dim=8, region=region)
    for found, wanted in zip(pooled_norm(**given), pooled_reference(**given), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_means_are_of_the_cells_inside_and_carry_no_gradient(poisoned):
    given = pooled_inputs("cpu", torch.float32, batch=2, grid=(5, 4, 1), dim=1024, region=(3, 4))
    n, means = pooled_norm(**given)
    n_BHWC = n[:, 1:].unflatten(1, (5, 4))
    wanted = torch.stack([n_BHWC[:, :3].mean((1, 2)), n_BHWC[:, 3:].mean((1, 2))], 1)
    torch.testing.assert_close(means, wanted, rtol=1e-5, atol=1e-5)
    assert n.requires_grad and not means.requires_grad and means.dtype == torch.float32


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (4, 5)}, r"pooled_norm: x must be \(B, 0 \+ 4\*5, C\), got \(1, 16, 8\)"),
        (
            {"region": (0, 2)},
            r"region must be a height and a width of at least 1, got \(0, 2\); give the tokens on a side",
        ),
        ({"norm_bias": torch.zeros(4)}, r"norm_bias must be \(8,\), got \(4,\)"),
    ],
)
def test_pooled_norm_refuses(change, message):
    given = pooled_inputs("cpu", torch.float32, batch=1, grid=(4, 4), dim=8, region=(2, 2))
    with pytest.raises(ValueError, match=message):
        pooled_norm(**{**given, **change})


def test_refuses_more_channels_than_a_program_holds():
    conv = conv_inputs("cpu", torch.float32, batch=1, grid=(1, 1), dim=1032)
    pooled = pooled_inputs("cpu", torch.float32, batch=1, grid=(1, 1), dim=1032, region=(1, 1))
    for function, given in ((conv_norm, conv), (pooled_norm, pooled)):
        with pytest.raises(ValueError, match=r"the kernels take at most 1024 channels, got 1032; use backend=torch"):
            function(**given)
