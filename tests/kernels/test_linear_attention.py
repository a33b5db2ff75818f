"""Linear attention: what it refuses, what its special cases equal, and inputs that break the plain formulas."""

import pytest
import torch

from kernels.linear_attention import cases, focused_linear_attention, inline_attention


def heads(x_BNC, num_heads):
    return x_BNC.double().unflatten(2, (num_heads, -1)).transpose(1, 2)


def error(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def packed(tokens, dim, batch=1, seed=0):
    return torch.randn(batch, tokens, 3 * dim, generator=torch.Generator().manual_seed(seed))


ones, reference = torch.ones, cases.OPERATION.reference


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: inline_attention(ones(1, 4, 100), (2, 2), 3),
            r"inline_attention: qkv must be \(B, N, 3 \* 3 heads \* D\), got \(1, 4, 100\); pass the output of",
        ),
        (
            lambda: inline_attention(ones(1, 5, 96), (2, 2), 2),
            r"inline_attention: qkv must have 0 \+ 2\*2 tokens, got 5; pass the grid of this map",
        ),
        (
            lambda: inline_attention(ones(2, 4, 96), (2, 2), 2, dynamic_weight_BC33=ones(1, 32, 3, 3)),
            r"inline_attention: dynamic_weight_BC33 must be \(2, 32, 3, 3\), got \(1, 32, 3, 3\); see the docstring",
        ),
        (
            lambda: focused_linear_attention(ones(1, 4, 96), (2, 2), 2, scale_C=ones(16)),
            r"focused_linear_attention: scale_C must be \(32,\), got \(16,\); see the docstring",
        ),
        (
            lambda: focused_linear_attention(ones(1, 4, 96), (2, 2), 2, scale_C=ones(32), position_NC=ones(3, 32)),
            r"focused_linear_attention: position_NC must be \(4, 32\), got \(3, 32\); see the docstring",
        ),
        (
            lambda: focused_linear_attention(ones(1, 4, 96), (2, 2), 2, scale_C=ones(32), weight=ones(32, 1, 3, 3)),
            r"weight must be \(16, 1, k, k\) with odd k, got \(32, 1, 3, 3\); see nn.Conv2d",
        ),
        (
            lambda: focused_linear_attention(
                ones(1, 4, 96), (2, 2), 2, scale_C=ones(32), lepe_weight=ones(32, 1, 5, 5)
            ),
            r"lepe_weight must be \(32, 1, 3, 3\), got \(32, 1, 5, 5\); see nn.Conv2d",
        ),
        (
            lambda: focused_linear_attention(ones(1, 4, 96), (2, 2), 2, scale_C=ones(32), bias=ones(16)),
            r"bias needs weight, got only bias; give both or none",
        ),
        (
            lambda: focused_linear_attention(ones(1, 4, 96), (2, 2), 2, scale_C=ones(32), power=0.5),
            r"power must be at least 1, got 0.5; the paper uses 3",
        ),
        (
            lambda: focused_linear_attention(ones(1, 4, 96), (2, 2), 2, scale_C=ones(32), weight=ones(16, 1, 9, 9)),
            r"the kernels go up to 7x7 weights, got 9; use backend=torch",
        ),
        (
            lambda: inline_attention(ones(1, 4, 3 * 160), (2, 2), 1),
            r"the kernels take at most 128 channels per head, got 160; use more heads",
        ),
    ],
)
def test_refuses(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_inline_equals_the_papers_subtraction():
    qkv = packed(36, 32)
    q, k, v = (heads(x, 2) for x in qkv.chunk(3, -1))
    logits = q @ k.mT * 16**-0.5
    wanted = (logits - logits.mean(-1, keepdim=True) + 1) @ v / 36
    assert error(heads(inline_attention(qkv, (5, 7, 1), 2), 2), wanted) < 1e-5


def test_inline_does_not_cancel_with_large_means():
    """Keys around 3000, values around 1000: the plain formula loses five of its seven digits."""
    qkv = packed(100, 16) + torch.tensor([0.0, 3000.0, 1000.0]).repeat_interleave(16)
    q, k, v = (heads(x, 1) for x in qkv.chunk(3, -1))
    wanted = q / 4 @ ((k - k.mean(2, keepdim=True)).mT @ (v - v.mean(2, keepdim=True)) / 100)
    found = heads(inline_attention(qkv, (10, 10), 1), 1) - v.mean(2, keepdim=True)
    assert error(found, wanted) < 1e-2


def test_power_1_leaves_the_features():
    qkv, scale = packed(12, 32), torch.full((32,), 0.7)
    focused = focused_linear_attention(qkv, (3, 4), 2, power=1.0, scale_C=scale)
    q, k, v = ((x.double() if i == 2 else x.double().relu() + 1e-6) for i, x in enumerate(qkv.chunk(3, -1)))
    weights = heads(q, 2) @ heads(k, 2).mT
    assert error(heads(focused, 2), weights / weights.sum(-1, keepdim=True) @ heads(v, 2)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("power", [3.0, 8.0, 32.0])
def test_stays_finite_where_no_channel_is_positive(dtype, power):
    """Features of 1e-6 in every channel: their powers underflow, and their norms divide 0 by 0."""
    qkv = packed(6, 32)
    qkv[:, :, :64] = -qkv[:, :, :64].abs()
    qkv = qkv.to(dtype).requires_grad_()
    scale = torch.full((32,), 0.7, requires_grad=True)
    out = focused_linear_attention(qkv, (2, 3), 2, power=power, scale_C=scale)
    gradients = torch.autograd.grad(out.float().square().sum(), [qkv, scale])
    assert all(t.isfinite().all() for t in (out, *gradients))
    assert error(out, reference(qkv.double(), (2, 3), 2, power=power, scale_C=scale)) < 0.01


@pytest.mark.parametrize("head_dim", [24, 96, *(pytest.param(n, marks=pytest.mark.full) for n in (16, 48))])
def test_head_widths(head_dim):
    inputs = cases.focused_inputs("cpu", torch.float32, batch=1, grid=(3, 5), heads=2, dim=2 * head_dim, kernel=0)
    found = torch.autograd.grad(focused_linear_attention(**inputs).sin().sum(), inputs["qkv_BNC"])[0]
    doubled = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    wanted = torch.autograd.grad(reference(**doubled).sin().sum(), inputs["qkv_BNC"])[0]
    assert error(found, wanted.double()) < 1e-5


def test_shares_of_the_tokens_are_added(monkeypatch):
    """As on a large map: several shares per image, and heads in groups."""
    from kernels.linear_attention import triton, triton_backward

    inputs = cases.focused_inputs("cpu", torch.float32, batch=2, grid=(9, 10), heads=3, dim=48, kernel=0)
    wanted = torch.autograd.grad(focused_linear_attention(**inputs).sin().sum(), inputs["qkv_BNC"])[0]
    for module in (triton, triton_backward):
        monkeypatch.setattr(module, "shares", lambda B, N, M, BT, span, together: (BT, -(-N // BT), 2, 2))
    assert not triton.tiles("state", 16, 90)["BT"] >= 90
    found = torch.autograd.grad(focused_linear_attention(**inputs).sin().sum(), inputs["qkv_BNC"])[0]
    assert error(found, wanted.double()) < 1e-5


def test_every_stage_has_shares_that_cover_it():
    from kernels.linear_attention.triton import shares

    for operation in cases.OPERATIONS:
        for shape in operation.stages.values():
            N = sum(shape["grid"][2:]) + shape["grid"][0] * shape["grid"][1]
            for together in (False, True):
                span, chunks, groups, per = shares(shape["batch"], N, shape["heads"], 64, 512, together)
                assert span * (chunks - 1) < N <= span * chunks and span % 64 == 0
                assert per * (groups - 1) < shape["heads"] <= per * groups
