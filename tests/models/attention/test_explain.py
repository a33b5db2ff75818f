"""Explain mode: the same output, by way of matrices that have gradients."""

import pytest
import torch

from models import create_model
from models.attention.explain import explained

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {"dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"layout": "grid"},
        {"layout": "axial"},
        {"layout": "stripes", "bias": "relative"},
        {"attention": "agent"},
        {"attention": "focused_linear"},
        {"attention": "moh"},
    ],
    ids=lambda chosen: "-".join(chosen.values()) or "softmax",
)
def test_the_output_is_the_same_and_so_is_its_gradient(chosen):
    model = create_model("vit_32px", **SMALL, **chosen).eval()
    images, plain = IMAGES.clone().requires_grad_(), IMAGES.clone().requires_grad_()
    with explained(model) as matrices:
        logits = model(images)
    expected = model(plain)
    torch.testing.assert_close(logits, expected)
    for result in (logits, expected):
        result[:, 0].sum().backward()
    torch.testing.assert_close(images.grad, plain.grad)
    assert len(matrices) == 2
    for (weights,) in matrices.values():
        assert weights.shape[-2:] == weights.grad.shape[-2:] and weights.grad.abs().sum() > 0


def test_the_gradient_is_that_of_what_a_weight_changes():
    """A step of one weight changes the output by its gradient, to first order: here exactly, of the last block."""
    model = create_model("vit_32px", **SMALL | {"depth": 1}).eval().double()
    (mixer,) = [module for module in model.modules() if type(module).__name__ == "MultiHead"]
    caught = {}
    mixer.register_forward_hook(lambda _, args, result: caught.update(x=args[0], grid=args[1], out=result.x))
    with explained(model) as matrices:
        model(IMAGES.double())
    (weights,) = (
        matrices["stages.3.blocks.0.attn"] if "stages.3.blocks.0.attn" in matrices else next(iter(matrices.values()))
    )
    caught["out"].square().sum().backward()
    changed = weights.detach().clone()
    changed[0, 1, 2, 3] += 1e-6
    step = mixer.attend(changed, caught["x"], caught["grid"]).square().sum() - caught["out"].square().sum()
    torch.testing.assert_close(step / 1e-6, weights.grad[0, 1, 2, 3], rtol=1e-4, atol=1e-6)


def test_outside_of_it_nothing_is_noted():
    model = create_model("vit_32px", **SMALL).eval()
    with explained(model) as matrices:
        pass
    model(IMAGES)
    assert matrices == {}


def test_a_model_without_matrices_is_refused():
    text, model = (
        r"explained: no place of the model has a matrix, got DepthwiseConv; choose",
        create_model("vit_32px", "conv"),
    )
    with pytest.raises(ValueError, match=text), explained(model):
        pass
