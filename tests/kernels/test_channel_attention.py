"""What is particular to channel attention."""

import pytest
import torch
from torch.nn import functional as F

from kernels.channel_attention import channel_attention
from kernels.channel_attention import triton as fused
from kernels.channel_attention.cases import OPERATION, inputs

reference = OPERATION.reference


def heads_of(qkv, num_heads):
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def gradient(function, given):
    o = function(**given)
    (found,) = torch.autograd.grad(o, given["qkv_BNC"], torch.linspace(-1, 1, o.numel()).view_as(o))
    return o.detach(), found


def test_is_dense_attention_with_channels_as_tokens():
    given = inputs("cpu", torch.float32, batch=2, tokens=70, dim=64, heads=2)
    q, k, v = heads_of(given["qkv_BNC"].detach(), 2)
    wanted = F.scaled_dot_product_attention(k.mT, v.mT, q.mT, scale=32**-0.5).mT
    torch.testing.assert_close(channel_attention(**given), wanted.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "width", [24, 128, *(pytest.param(n, marks=pytest.mark.full) for n in (16, 32, 48, 64, 72, 96))]
)
def test_any_head_width(width, poisoned):
    given = inputs("cpu", torch.float32, batch=1, tokens=65, dim=3 * width, heads=3)
    for found, wanted in zip(gradient(channel_attention, given), gradient(reference, given), strict=True):
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_of_an_image_add_up_to_the_whole(dtype, monkeypatch, poisoned):
    given = inputs("cpu", dtype, batch=2, tokens=150, dim=48, heads=2)
    whole = gradient(channel_attention, given)
    monkeypatch.setattr(fused, "parts", lambda *_: (3, 64))
    parts = gradient(channel_attention, given)
    for a, b in zip(parts, whole, strict=True):
        assert (a.double() - b).norm() < (1e-6 if dtype == torch.float32 else 3e-3) * b.double().norm()


def test_an_image_is_cut_only_where_images_and_heads_do_not_fill_the_machine():
    assert fused.parts(128, 3136, 4, 2) == (1, 3136)
    assert fused.parts(1, 196, 16, 2) == (1, 196)
    count, size = fused.parts(1, 3136, 4, 2)
    assert count > 1 and (count - 1) * size < 3136 <= count * size
    assert fused.parts(0, 3136, 4, 2)[0] > 0


def test_large_logits_choose_one_channel():
    """Logits are sums over tokens: they leave the range of float16, and their exponentials that of float32."""
    given = inputs("cpu", torch.float16, batch=1, tokens=100, dim=32, heads=1, scale=1e4)
    o = channel_attention(**given)
    q, k, v = heads_of(given["qkv_BNC"].detach().float(), 1)
    chosen = (k.mT @ v).argmax(-1)
    torch.testing.assert_close(
        o.float(), q.gather(-1, chosen.unsqueeze(2).expand_as(q)).squeeze(1), rtol=1e-3, atol=1e-3
    )


def test_scale_may_depend_on_the_number_of_tokens_in_one_graph():
    torch._dynamo.reset()

    def attend(qkv):
        return channel_attention(qkv, 2, scale=qkv.shape[1] ** -0.5)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (33, 50):
        qkv = torch.randn(1, tokens, 96)
        torch.testing.assert_close(compiled(qkv), reference(qkv, 2, scale=tokens**-0.5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "heads", "message"),
    [
        (
            (1, 4, 50),
            2,
            r"channel_attention: qkv must be \(B, N, 3 \* 2 heads \* D\), got \(1, 4, 50\); pass the output",
        ),
        ((4, 48), 2, r"qkv must be \(B, N, 3 \* 2 heads \* D\), got \(4, 48\)"),
        ((1, 4, 48), 0, r"qkv must be \(B, N, 3 \* 0 heads \* D\), got \(1, 4, 48\)"),
        (
            (1, 4, 3 * 160),
            1,
            r"the kernels take at most 128 channels per head, got 160; use more heads, or backend=torch",
        ),
    ],
)
def test_refuses(shape, heads, message):
    with pytest.raises(ValueError, match=message):
        channel_attention(torch.zeros(shape), heads)
