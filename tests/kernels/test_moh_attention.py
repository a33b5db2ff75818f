"""What is particular to mixture-of-head attention: leaving out is exact, and gates are those of the paper's router."""

import pytest
import torch
import torch.nn.functional as F

from kernels.moh_attention import moh_attention, register, route_heads
from kernels.moh_attention.cases import OPERATION, ROUTER, inputs, route_inputs

reference, route_reference = OPERATION.reference, ROUTER.reference

SMALL = {"batch": 2, "tokens": 20, "heads": 3, "head_dim": 16, "shared": 1, "active": 2}


def near(found, wanted, most: float = 1e-5) -> None:
    found, wanted = found.double(), wanted.double()
    assert (found - wanted).norm() <= most * wanted.norm()


def gradients(output, *leaves, seed: int = 0):
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output)
    return torch.autograd.grad(output, leaves, direction)


@pytest.mark.parametrize("skip", ["always", "never"])
def test_with_all_gates_1_it_is_softmax_attention(skip):
    given = inputs("cpu", torch.float32, **SMALL)
    q, k, v = given["qkv_BNC"].unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    near(moh_attention(given["qkv_BNC"], torch.ones(2, 20, 3), 3, skip=skip), wanted)


@pytest.mark.parametrize("head_dim", [24, 128, *(pytest.param(n, marks=pytest.mark.full) for n in (8, 40, 112))])
@pytest.mark.parametrize("skip", ["always", "never"])
def test_other_head_widths_and_scales(skip, head_dim, poisoned):
    given = inputs("cpu", torch.float32, **{**SMALL, "head_dim": head_dim, "skip": skip})
    leaves = given["qkv_BNC"], given["gates_BNM"]
    found, wanted = moh_attention(**given, scale=0.3), reference(**given, scale=0.3)
    near(found, wanted)
    for a, b in zip(gradients(found, *leaves), gradients(wanted, *leaves), strict=True):
        near(a, b)


def test_what_is_left_out_is_never_read(poisoned):
    """NaN in the queries, and in the gradient of the output, of pairs without a gate changes nothing."""
    given = inputs("cpu", torch.float32, **{**SMALL, "skip": "always"})
    qkv, gates = given["qkv_BNC"], given["gates_BNM"]
    without = (gates == 0).unsqueeze(-1).expand(-1, -1, -1, 16).flatten(2)
    direction = torch.randn(2, 20, 48)
    wanted = moh_attention(**given)
    wanted_gradients = torch.autograd.grad(wanted, (qkv, gates), direction)

    broken = qkv.detach().clone()
    broken[..., :48][without] = float("nan")
    broken.requires_grad_()
    found = moh_attention(broken, gates, 3, skip="always")
    found_gradients = torch.autograd.grad(found, (broken, gates), direction.masked_fill(without, float("nan")))
    assert torch.equal(found, wanted)
    assert all(torch.equal(a, b) for a, b in zip(found_gradients, wanted_gradients, strict=True))
    assert not found[without].any() and not found_gradients[0][..., :48][without].any()
    assert not found_gradients[1][gates == 0].any()


@pytest.mark.parametrize("skip", ["always", "never"])
def test_two_launches_backward_give_what_one_gives(skip, monkeypatch, poisoned):
    from kernels.moh_attention import triton as fused

    given = inputs("cpu", torch.float32, **{**SMALL, "tokens": 100, "skip": skip})
    leaves = given["qkv_BNC"], given["gates_BNM"]
    one = gradients(moh_attention(**given), *leaves)
    monkeypatch.setattr(fused, "SEPARATE_FROM", 1)
    for a, b in zip(gradients(moh_attention(**given), *leaves), one, strict=True):
        near(a, b, 1e-6)


@pytest.mark.parametrize(("tokens", "skip", "launches"), [(20, "auto", 2), (20, "always", 3), (520, "auto", 4)])
def test_number_of_launches(tokens, skip, launches, monkeypatch):
    from kernels.moh_attention import triton as fused

    launched = []
    monkeypatch.setattr(fused, "launch", lambda kernel, *_, **__: launched.append(kernel))
    given = inputs("cpu", torch.float32, **{**SMALL, "tokens": tokens, "skip": skip})
    gradients(moh_attention(**given), given["qkv_BNC"], given["gates_BNM"])
    assert len(launched) == launches


def test_half_precision_gates_have_half_precision_gradients():
    given = inputs("cpu", torch.bfloat16, **{**SMALL, "skip": "always"})
    gates = given["gates_BNM"].detach().bfloat16().requires_grad_()
    found = moh_attention(given["qkv_BNC"], gates, 3, skip="always")
    wanted = reference(given["qkv_BNC"].double(), gates.double(), 3)
    near(found, wanted, 0.01)
    (gradient,) = gradients(found, gates)
    assert gradient.dtype == torch.bfloat16
    near(gradient, gradients(wanted, gates)[0], 0.01)


def test_tokens_of_a_head_are_listed_in_order_over_many_chunks(poisoned):
    from kernels.moh_attention import triton as fused

    gates = (torch.rand(2, 700, 3, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    gates[:, :, 0], gates[:, :, 1] = 1, 0
    index, count = torch.empty(2, 3, 700, dtype=torch.int32), torch.empty(2, 3, dtype=torch.int32)
    fused.launch(fused._list, (6,), gates, index, count, 700, M=3, CHUNK=128)
    assert torch.equal(count.long(), (gates != 0).sum(1))
    for b in range(2):
        for m in range(3):
            n = count[b, m]
            assert index[b, m, :n].tolist() == gates[b, :, m].nonzero().flatten().tolist()
            assert sorted(index[b, m, n:].tolist()) == (gates[b, :, m] == 0).nonzero().flatten().tolist()


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.full), True])
def test_leaving_out_compiles_passes_opcheck_and_repeats(dynamic):
    torch._dynamo.reset()
    given = inputs("cpu", torch.float32, **{**SMALL, "skip": "always"})
    leaves = given["qkv_BNC"], given["gates_BNM"]
    compiled = torch.compile(moh_attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)(**given)
    wanted = moh_attention(**given)
    assert torch.equal(compiled, wanted)
    for a, b in zip(gradients(compiled, *leaves), gradients(wanted, *leaves), strict=True):
        assert torch.equal(a, b)
    if dynamic:
        return
    qkv, gates = (t.detach() for t in leaves)
    out, lse, index, count = register.forward_op(qkv, gates, 0.25, True)
    torch.library.opcheck(register.forward_op, (qkv, gates, 0.25, True))
    torch.library.opcheck(register.backward_op, (out, qkv, gates, out, lse, index, count, 0.25, [True, True]))


# The router


def test_ties_go_to_the_lowest_index():
    logits = torch.tensor([[[0.0, 1, 1, 1, 0], [2, 2, 2, 2, 2], [5, 0, 0, 0, 0]]])
    gates, balance = route_heads(logits, 0, 2)
    assert gates.ne(0)[0].int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    wanted, wanted_balance = route_reference(logits, 0, 2)
    torch.testing.assert_close(gates, wanted)
    torch.testing.assert_close(balance, wanted_balance)


def test_an_undecided_router_gives_gates_of_1_and_a_loss_of_k():
    gates, balance = route_heads(torch.zeros(2, 9, 4 + 2 + 3), 3, 2)
    torch.testing.assert_close(gates, torch.tensor([1.0, 1, 1, 1, 1, 0, 0]).expand(2, 9, 7))
    torch.testing.assert_close(balance, torch.tensor(2.0))


def test_without_routed_heads():
    logits = torch.randn(2, 9, 3, requires_grad=True)
    gates, balance = route_heads(logits, 3, 0)
    wanted = 3 * logits.softmax(2)
    assert balance is None
    torch.testing.assert_close(gates, wanted)
    torch.testing.assert_close(gradients(gates, logits), gradients(wanted, logits))
    gates, balance = route_heads(torch.zeros(2, 9, 0, requires_grad=True), 1, 0)
    assert balance is None and torch.equal(gates, torch.ones(2, 9, 1))


def test_programs_of_the_router_share_the_tokens(monkeypatch, poisoned):
    from kernels.moh_attention import triton_router as fused

    monkeypatch.setattr(fused, "PROGRAMS", 2)
    given = route_inputs("cpu", torch.float32, batch=3, tokens=150, experts=5, shared=2, routed=2)
    for a, b in zip(route_heads(**given), route_reference(**given), strict=True):
        near(a, b)


def test_half_precision_logits_are_routed_in_float32():
    logits = torch.randn(2, 9, 6).bfloat16().requires_grad_()
    gates, balance = route_heads(logits, 0, 3)
    assert gates.dtype == balance.dtype == torch.float32
    assert torch.equal(gates.ne(0), route_reference(logits.float(), 0, 3)[0].ne(0))
    assert gradients(gates, logits)[0].dtype == torch.bfloat16


# What is refused


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"skip": "never ever"},
            "moh_attention: skip must be auto, always or never, got never ever; choose one of them",
        ),
        ({"scale": 0.0}, r"moh_attention: scale must be above 0, got 0.0; use None for D\^-1/2"),
        ({"num_heads": 5}, r"moh_attention: qkv must be \(B, N, 3·5·D\), got \(2, 20, 144\); pass the output of the"),
        (
            {"gates_BNM": torch.ones(2, 20, 4)},
            r"moh_attention: gates must be \(2, 20, 3\) and floating, got \(2, 20, 4\) float32; give one gate",
        ),
        (
            {"gates_BNM": torch.ones(2, 20, 3, dtype=torch.int64)},
            r"moh_attention: gates must be \(2, 20, 3\) and floating, got \(2, 20, 3\) int64; give one gate per token",
        ),
        (
            {"qkv_BNC": torch.ones(2, 20, 3 * 3 * 129)},
            "moh_attention: the kernels take at most 128 channels per head, got 129; use more heads, or backend=torch",
        ),
    ],
)
def test_attention_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        moh_attention(**{**inputs("cpu", torch.float32, **SMALL), **changed})


@pytest.mark.parametrize(
    ("logits", "shared", "routed", "message"),
    [
        (torch.ones(1, 2, 3), -1, 2, "shared and routed heads must be at least 0, and one of them above, got -1 and 2"),
        (torch.ones(1, 2, 3), 0, 0, "shared and routed heads must be at least 0, and one of them above, got 0 and 0"),
        (
            torch.ones(1, 2, 3),
            4,
            0,
            r"logits of 4 shared and 0 routed heads must be \(B, N, 4\), got \(1, 2, 3\); pass",
        ),
        (
            torch.ones(1, 2, 6),
            3,
            2,
            r"of 3 shared and 2 routed heads must be \(B, N, 7 or more\), got \(1, 2, 6\); pass",
        ),
        (torch.ones(2, 3), 0, 2, r"of 0 shared and 2 routed heads must be \(B, N, 3 or more\), got \(2, 3\); pass wg"),
        (torch.ones(1, 2, 3, dtype=torch.int64), 0, 2, "route_heads: logits must be floating, got int64; cast them"),
    ],
)
def test_router_refuses(logits, shared, routed, message):
    with pytest.raises(ValueError, match=message):
        route_heads(logits, shared, routed)
