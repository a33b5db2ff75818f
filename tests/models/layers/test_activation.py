"""Activations by name: what they keep, and what they refuse."""

import pytest
import torch

from models.layers.activation import made, swiglu


def test_topk_keeps_the_largest_and_their_gradient_alone():
    act, x = made("Net", {"name": "topk", "k": 3}, 16), torch.randn(2, 5, 16, requires_grad=True)
    y = act(x)
    assert ((y > 0).sum(-1) <= 3).all()
    torch.testing.assert_close(y.sum(-1), x.relu().topk(3).values.sum(-1))
    y.sum().backward()
    assert torch.equal(x.grad, (y > 0).float())
    assert made("Net", "topk", 32).k == 4


def test_relu2_is_the_square_of_relu():
    x = torch.randn(7, requires_grad=True)
    made("Net", "relu2", 7)(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach().relu())


def test_swiglu_has_about_the_parameters_of_the_mlp():
    assert sum(p.numel() for p in swiglu(48, 192).parameters()) == pytest.approx(2 * 48 * 192, rel=0.03)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("swish", "Net: activation must be one of gelu, relu, relu2, silu, topk, swiglu, got 'swish'; set model.act"),
        (3, "Net: activation must be one of .*, got 3; set model.activation"),
        ({"k": 3}, r"Net: activation must be one of .*, got \{'k': 3\}; set model.activation"),
        ({"name": "relu", "k": 3}, "Net: activation relu has no option 'k', got .*; leave it out"),
        (
            {"name": "topk", "k": 17},
            "Net: activation topk keeps k of the 16 .*, got k=17; set model.activation=.name: topk, k: 2.",
        ),
        ({"name": "topk", "k": 0.5}, "got k=0.5; set model.activation="),
    ],
)
def test_what_is_none_is_refused(setting, text):
    with pytest.raises(ValueError, match=text):
        made("Net", setting, 16)
