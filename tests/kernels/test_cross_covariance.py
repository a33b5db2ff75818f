"""What is particular to cross-covariance attention."""

import pytest
import torch
from torch.nn import functional as F

from kernels.cross_covariance import cross_covariance
from kernels.cross_covariance.cases import OPERATION, inputs

reference = OPERATION.reference


def gradients(function, given):
    o = function(**given)
    wanted = [given["qkv_BNC"], given["temperature_M"]]
    return o.detach(), *torch.autograd.grad(o, wanted, torch.linspace(-1, 1, o.numel()).view_as(o))


def test_is_dense_attention_with_channels_as_tokens():
    given = inputs("cpu", torch.float32, batch=2, tokens=70, dim=64, heads=2)
    q, k, v = given["qkv_BNC"].detach().unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 4, 1)
    q, k = F.normalize(q, dim=-1) * given["temperature_M"].detach()[:, None, None], F.normalize(k, dim=-1)
    wanted = F.scaled_dot_product_attention(q, k, v, scale=1.0).permute(0, 3, 1, 2).flatten(2)
    torch.testing.assert_close(cross_covariance(**given), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "width", [24, 128, *(pytest.param(n, marks=pytest.mark.full) for n in (16, 32, 48, 64, 72, 96))]
)
def test_any_head_width(width, poisoned):
    given = inputs("cpu", torch.float32, batch=1, tokens=65, dim=3 * width, heads=3)
    for found, wanted in zip(gradients(cross_covariance, given), gradients(reference, given), strict=True):
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_the_length_of_a_channel_is_irrelevant_and_has_no_gradient():
    """Its gradient is at right angles to it; 1e-5 of both lengths is rounding."""
    given = inputs("cpu", torch.float32, batch=1, tokens=40, dim=32, heads=2)
    o, gradient, _ = gradients(cross_covariance, given)
    qkv = given["qkv_BNC"].detach()
    factors = torch.cat([torch.rand(64) + 0.5, torch.ones(32)])
    longer = cross_covariance(qkv * factors, given["temperature_M"].detach(), 2)
    torch.testing.assert_close(longer, o, rtol=1e-5, atol=1e-5)
    along = (gradient * qkv).sum(1)[0, :64].abs()
    assert (along < 1e-5 * gradient.norm(dim=1)[0, :64] * qkv.norm(dim=1)[0, :64]).all()


def test_rows_sum_to_one():
    """Channels of v that are alike come out as they are."""
    given = inputs("cpu", torch.float32, batch=1, tokens=30, dim=32, heads=2)
    qkv, alike = given["qkv_BNC"].detach(), torch.randn(1, 30, 1).expand(1, 30, 32)
    o = cross_covariance(torch.cat([qkv[..., :64], alike], dim=-1), given["temperature_M"].detach(), 2)
    torch.testing.assert_close(o, alike, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_channel_of_zeros(dtype):
    """It is as long as the least length, in forward and backward as in the definition."""
    given = inputs("cpu", dtype, batch=1, tokens=20, dim=32, heads=2)
    with torch.no_grad():
        given["qkv_BNC"][..., 3] = 0  # of q
        given["qkv_BNC"][..., 40] = 0  # of k
    for found, wanted in zip(gradients(cross_covariance, given), gradients(reference, given), strict=True):
        assert found.isfinite().all() and wanted.isfinite().all()
        limit = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps  # roundings of the output and before
        assert (found - wanted).norm() <= limit * wanted.norm()


@pytest.mark.parametrize(
    ("shape", "heads", "given", "message"),
    [
        ((1, 4, 50), 2, 2, r"cross_covariance: qkv must be \(B, N, 3 \* 2 heads \* D\), got \(1, 4, 50\); pass"),
        ((4, 48), 2, 2, r"qkv must be \(B, N, 3 \* 2 heads \* D\), got \(4, 48\)"),
        ((1, 4, 48), 0, 2, r"qkv must be \(B, N, 3 \* 0 heads \* D\), got \(1, 4, 48\)"),
        ((1, 4, 48), 2, 3, r"temperature must be \(2,\), got \(3,\); give one number per head"),
        ((1, 4, 3 * 160), 1, 1, r"the kernels take at most 128 channels per head, got 160; use more heads"),
    ],
)  # fmt: skip
def test_refuses(shape, heads, given, message):
    with pytest.raises(ValueError, match=message):
        cross_covariance(torch.zeros(shape), torch.zeros(given), heads)
