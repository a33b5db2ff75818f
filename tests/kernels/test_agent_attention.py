"""What is particular to agent attention."""

import pytest
import torch
import torch.nn.functional as F

from kernels.agent_attention import agent_attention, triton, triton_backward
from kernels.agent_attention.cases import OPERATION, inputs

reference = OPERATION.reference

SMALL = {"batch": 3, "grid": (4, 5, 1), "dim": 16, "heads": 1, "agents": (2, 3)}


def gradients(function, given: dict, **options) -> list[torch.Tensor]:
    leaves = [t for t in given.values() if isinstance(t, torch.Tensor)]
    generator = torch.Generator().manual_seed(1)
    out = function(**given, **options)
    direction = torch.randn(out.shape, generator=generator).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


def double(given: dict) -> dict:
    return {
        name: t.detach().double().requires_grad_() if isinstance(t, torch.Tensor) else t for name, t in given.items()
    }


def assert_equals_reference(given: dict, **options) -> None:
    wanted = gradients(reference, double(given), **options)
    for found, w in zip(gradients(agent_attention, given, **options), wanted, strict=True):
        assert (found.double() - w).norm() <= 1e-5 * w.norm()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_agents_for_every_token_are_dense_attention_twice(backend):
    """As many agents as tokens: the agents are the queries."""
    given = inputs("cpu", torch.float32, batch=2, grid=(3, 5), dim=32, heads=2, agents=(3, 5), tables=False, kernel=0)
    q, k, v = given["qkv_BNC"].unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    wanted = F.scaled_dot_product_attention(q, q, F.scaled_dot_product_attention(q, k, v))
    found = agent_attention(**given, backend=backend)
    torch.testing.assert_close(found, wanted.transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_weights_of_every_token_sum_to_one(backend):
    given = inputs("cpu", torch.float32, kernel=0, **SMALL)
    qkv = given["qkv_BNC"].detach().clone()
    qkv[..., 32:] = 1
    found = agent_attention(**{**given, "qkv_BNC": qkv}, backend=backend)
    torch.testing.assert_close(found, torch.ones_like(found), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_one_agent_says_the_same_to_all_tokens(backend):
    given = inputs("cpu", torch.float32, kernel=0, **{**SMALL, "agents": (1, 1)})
    found = agent_attention(**given, backend=backend)
    torch.testing.assert_close(found, found[:, :1].expand_as(found), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_convolution_skips_prefix_tokens(backend):
    given = inputs("cpu", torch.float32, **SMALL)
    without = agent_attention(**{**given, "weight": None, "bias": None}, backend=backend)
    local = agent_attention(**given, backend=backend) - without
    v_BCHW = given["qkv_BNC"][:, 1:, 32:].unflatten(1, (4, 5)).permute(0, 3, 1, 2)
    wanted = F.conv2d(v_BCHW, given["weight"], given["bias"], padding=1, groups=16).flatten(2).mT
    torch.testing.assert_close(local, F.pad(wanted, (0, 0, 1, 0)), atol=1e-5, rtol=1e-5)


def test_images_of_a_group_add_to_one_table(monkeypatch):
    """Groups of two images, the last one not full, as they are with large batches."""
    monkeypatch.setattr(triton_backward, "image_groups", lambda batch, heads, tiles, tables: (2, 2))
    assert_equals_reference(inputs("cpu", torch.float32, **SMALL))


@pytest.mark.parametrize("agents", [(4, 7), (13, 10)], ids=str)
def test_more_agents_than_tokens(agents):
    """Bins of single tokens that are in several of them; 130 agents are filled up to 256."""
    assert_equals_reference(inputs("cpu", torch.float32, batch=1, grid=(3, 4), dim=16, heads=1, agents=agents))


@pytest.mark.parametrize("missing", ["gather_bias_MAN", "scatter_bias_MNA", "bias"])
def test_one_of_the_parameters_may_be_missing(missing):
    assert_equals_reference({**inputs("cpu", torch.float32, **SMALL), missing: None})


def test_tables_in_any_layout_and_dtype():
    """As models make them: the second one is a transposed view, and one table may serve all heads."""
    given = inputs("cpu", torch.float32, **{**SMALL, "dim": 32, "heads": 2})
    gather = given["gather_bias_MAN"][:1].detach().double().requires_grad_()
    scatter = given["scatter_bias_MNA"].detach().mT.contiguous().requires_grad_()
    views = {"gather_bias_MAN": gather.expand(2, -1, -1), "scatter_bias_MNA": scatter.mT}
    found, wanted = (f(**{**given, **views}) for f in (agent_attention, reference))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for a, b in zip(*(torch.autograd.grad(y.sum(), [gather, scatter]) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_key_may_be_hidden():
    """Minus infinity in the first table: the agents do not see this token."""
    given = inputs("cpu", torch.float32, **SMALL)
    with torch.no_grad():
        given["gather_bias_MAN"][:, :, 3] = float("-inf")
    assert_equals_reference(given)


def test_a_scale_of_its_own():
    assert_equals_reference(inputs("cpu", torch.float32, **SMALL), scale=0.7)


def test_heads_of_128_channels():
    assert_equals_reference(inputs("cpu", torch.float32, **{**SMALL, "batch": 1, "dim": 128}))


def test_shares_cover_all_tokens():
    for pairs, tokens, tile in [
        (1, 257, 16),
        (1, 3136, 64),
        (3, 65536, 64),
        (40, 784, 64),
        (264, 3136, 64),
        (0, 900, 32),
    ]:
        count, share = triton.splits(pairs, tokens, tile)
        assert (count - 1) * share < tokens <= count * share
        assert count == 1 or share % tile == 0


REFUSED = [
    ({"grid": (4, 4)}, "qkv must be (B, 0 + 4*4, 3C), got (3, 21, 48); pass the grid of this map"),
    ({"num_heads": 5}, "the channels of qkv must be 3 * 5 heads * D, got 48; change num_heads"),
    ({"agents": (0, 3)}, "agents must be (height, width), both positive, got (0, 3); use e.g. (7, 7)"),
    ({"agents": (3, 3)}, "gather_bias_MAN must be (1, 9, 21), got (1, 6, 21); build it for this map"),
    ({"scatter_bias_MNA": torch.zeros(1, 6, 21)}, "scatter_bias_MNA must be (1, 21, 6), got (1, 6, 21); build it"),
    ({"weight": torch.zeros(16, 1, 2, 2)}, "weight must be (16, 1, k, k) with odd k, got (16, 1, 2, 2); see nn.Conv2d"),
    ({"weight": None}, "bias must be (16,) and come with weight, got (16,); see nn.Conv2d"),
    ({"backend": "cuda"}, "backend must be auto, triton, torch, got cuda; choose one of them"),
    ({"weight": torch.zeros(16, 1, 9, 9)}, "the kernels go up to 7x7 weights, got 9; use backend=torch"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_refusals(change, message):
    given = {**inputs("cpu", torch.float32, **SMALL), **change}
    with pytest.raises(ValueError) as caught:
        agent_attention(**given)
    assert f"agent_attention: {message}" in str(caught.value)


def test_refuses_too_many_agents_and_too_wide_heads():
    with pytest.raises(
        ValueError, match=r"agent_attention: the kernels take at most 256 agents, got 16\*17; use fewer"
    ):
        agent_attention(torch.zeros(1, 16, 48), (4, 4), 1, (16, 17))
    with pytest.raises(ValueError, match="agent_attention: the kernels take at most 128 channels per head, got 160"):
        agent_attention(torch.zeros(1, 16, 480), (4, 4), 1, (2, 2))
