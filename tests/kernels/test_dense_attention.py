"""What is particular to dense attention with other weights: what is clipped, and what needs no other pair."""

import re

import pytest
import torch
import torch.nn.functional as F

from kernels.dense_attention import clipped_attention, sigmoid_attention, sigmoid_weights
from kernels.dense_attention.cases import CLIPPED_OPERATION, SIGMOID_OPERATION, clipped_inputs, sigmoid_inputs

SMALL = {"batch": 2, "tokens": 20, "heads": 3, "head_dim": 16}
OPERATIONS = {"sigmoid": SIGMOID_OPERATION, "clipped": CLIPPED_OPERATION}


def near(found, wanted, most: float = 1e-5) -> None:
    found, wanted = found.double(), wanted.double()
    assert (found - wanted).norm() <= most * wanted.norm()


def gradients(output, *leaves):
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    return torch.autograd.grad(output, leaves, direction)


def heads_of(qkv, heads: int = 3):
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def test_with_nothing_to_clip_it_is_softmax_attention(poisoned):
    given = clipped_inputs("cpu", torch.float32, **SMALL, gamma=0.0)
    qkv = given["qkv_BNC"]
    wanted = F.scaled_dot_product_attention(*heads_of(qkv)).transpose(1, 2).flatten(2)
    found = clipped_attention(**given)
    near(found, wanted)
    near(gradients(found, qkv)[0], gradients(wanted, qkv)[0])


def test_what_is_clipped_has_no_weight_and_no_gradient(poisoned):
    """Undecided rows of 20 keys have weights of 1 / 20 - 1 / 10: nothing is attended to, and nothing is learned."""
    qkv = torch.randn(2, 20, 144)
    qkv[..., :48] = 0
    qkv.requires_grad_()
    found = clipped_attention(qkv, 3, gamma=-0.1)
    assert not found.any()
    assert not gradients(found, qkv)[0].any()


def test_a_weight_can_be_exactly_1(poisoned):
    """A query that has found its key copies the value, bit for bit."""
    qkv = torch.randn(1, 20, 48)
    qkv[..., :16] = qkv[..., 16:32] = 20 * torch.eye(20)[:, :16]
    found = clipped_attention(qkv, 1, gamma=-0.03, zeta=1.03)
    assert torch.equal(found[:, :16], qkv[:, :16, 32:])


def test_each_pair_of_sigmoid_attention_is_by_itself(poisoned):
    """More keys add to the output, and change nothing of what was there."""
    qkv = torch.randn(2, 20, 144)
    few, silent = qkv.clone(), qkv.clone()
    silent[:, 13:, 96:] = 0
    near(sigmoid_attention(few[:, :13], 3, bias=-2.0), sigmoid_attention(silent, 3, bias=-2.0)[:, :13])


# of infinite weights in rows that are dropped, which the interpreter computes as well
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("logit", [-300.0, 300.0])
def test_logits_far_out_are_finite(logit, poisoned):
    """Where the sigmoid is 0 or 1 to the last bit, and the sum of the softmax a single exponential."""
    qkv = torch.ones(1, 20, 48)
    qkv[..., :16], qkv[..., 16:32] = logit / 16**0.5, 1.0
    qkv.requires_grad_()
    for found, wanted in (
        (sigmoid_attention(qkv, 1), torch.full((1, 20, 16), 20.0 if logit > 0 else 0.0)),
        (clipped_attention(qkv, 1, gamma=-0.01), torch.full((1, 20, 16), 20 * (1.01 / 20 - 0.01))),
    ):
        torch.testing.assert_close(found, wanted)
        assert gradients(found, qkv)[0].isfinite().all()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("head_dim", [24, 128, *(pytest.param(n, marks=pytest.mark.full) for n in (8, 40, 72, 112))])
def test_other_head_widths_and_scales(name, head_dim, poisoned):
    operation = OPERATIONS[name]
    given = operation.inputs("cpu", torch.float32, **{**SMALL, "head_dim": head_dim})
    found, wanted = operation.run(**given, scale=0.3), operation.reference(**given, scale=0.3)
    near(found, wanted)
    near(gradients(found, given["qkv_BNC"])[0], gradients(wanted, given["qkv_BNC"])[0])


def test_the_gradient_of_a_learned_bias_is_summed_over_tiles_and_images(poisoned):
    given = sigmoid_inputs("cpu", torch.bfloat16, **{**SMALL, "tokens": 130, "heads": 1}, learned=True)
    leaves = given["qkv_BNC"], given["bias"]
    (alone,) = gradients(sigmoid_attention(**given), given["bias"])
    _, both = gradients(sigmoid_attention(**given), *leaves)
    exact = {**given, "qkv_BNC": given["qkv_BNC"].double(), "bias": given["bias"].double()}
    (wanted,) = gradients(SIGMOID_OPERATION.reference(**exact), exact["bias"])
    assert torch.equal(alone, both) and alone.dtype == torch.float32
    near(alone, wanted, 0.01)


@pytest.mark.parametrize(
    ("name", "shape", "trained", "launches"),
    [
        ("sigmoid", {}, ["qkv_BNC"], [(True, True, False)]),
        ("sigmoid", {"learned": True}, ["qkv_BNC", "bias"], [(True, True, True)]),
        ("sigmoid", {"learned": True}, ["qkv_BNC"], [(True, True, False)]),
        ("sigmoid", {"learned": True}, ["bias"], [(True, False, True)]),
        ("clipped", {}, ["qkv_BNC"], [(True, False, False), (False, True, False)]),
    ],
)
def test_what_the_backward_launches(name, shape, trained, launches, monkeypatch):
    """Both phases in one launch of sigmoid weights, in two of clipped ones; what is not needed is left out."""
    from kernels.dense_attention import triton_backward as fused

    made = []
    names = ("QUERIES", "KEYS", "SUM")
    monkeypatch.setattr(fused, "launch", lambda kernel, *_, **given: made.append(tuple(given[n] for n in names)))
    given = OPERATIONS[name].inputs("cpu", torch.float32, **SMALL, **shape)
    given |= {n: t.detach().requires_grad_(n in trained) for n, t in given.items() if isinstance(t, torch.Tensor)}
    gradients(OPERATIONS[name].run(**given), *(given[n] for n in trained))
    assert made == launches


def test_no_tensor_of_all_pairs_is_kept():
    """For the backward: the projection, and of clipped weights a number for each row."""
    for operation, kept in ((SIGMOID_OPERATION, 0), (CLIPPED_OPERATION, 2 * 3 * 20)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            operation.run(**operation.inputs("cpu", torch.float32, **SMALL))
        assert sorted(sizes) == sorted([2 * 20 * 144] + [kept] * (kept > 0))


def test_weights_of_closed_pairs_are_0():
    logits, open = torch.randn(1, 1, 4, 4), torch.eye(4, dtype=torch.bool)
    weights = sigmoid_weights(logits, open, bias=1.0)
    assert not weights[..., ~open].any() and weights[..., open].gt(0).all()


@pytest.mark.parametrize(
    ("run", "changed", "message"),
    [
        (sigmoid_attention, {"scale": 0.0}, "sigmoid_attention: scale must be above 0, got 0.0; use None for D^-1/2"),
        (
            clipped_attention,
            {"scale": -1.0, "gamma": 0},
            "clipped_attention: scale must be above 0, got -1.0",
        ),
        (
            sigmoid_attention,
            {"num_heads": 5},
            "sigmoid_attention: qkv must be (B, N, 3·5·D), got (2, 20, 144); pass the output of the projection",
        ),
        (
            sigmoid_attention,
            {"factor": 0.0},
            "sigmoid_attention: factor must be a number above 0, got 0.0; 1 leaves the logits as they are",
        ),
        (
            sigmoid_attention,
            {"bias": torch.ones(3)},
            "sigmoid_attention: bias must be a number or (3, 1, 1) and floating, got (3,) float32; give one per head",
        ),
        (
            sigmoid_attention,
            {"bias": torch.ones(3, 1, 1, dtype=torch.int64)},
            "sigmoid_attention: bias must be a number or (3, 1, 1) and floating, got (3, 1, 1) int64; give one",
        ),
        (
            clipped_attention,
            {"gamma": 0.1},
            "clipped_attention: gamma must be a number of at most 0, got 0.1; 0 clips no small weight",
        ),
        (
            clipped_attention,
            {"gamma": 0.0, "zeta": 0.9},
            "clipped_attention: zeta must be a number of at least 1, got 0.9; 1 clips no large weight",
        ),
        (
            clipped_attention,
            {"gamma": 0.0, "qkv_BNC": torch.ones(2, 20, 3 * 3 * 129)},
            "clipped_attention: the kernels take at most 128 channels per head, got 129; use more heads, or backend=",
        ),
    ],
)
def test_what_is_refused(run, changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(**{"qkv_BNC": torch.randn(2, 20, 144), "num_heads": 3, **changed})
