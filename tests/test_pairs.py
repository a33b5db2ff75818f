"""Every attention in every kind of backbone, on square and wide images: it trains, or it is refused with the fix.

`python tests/test_pairs.py` prints the matrix.
"""

import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from conf import families
from models import create_model, list_attentions

MODELS = families.small()
SHAPES = {"square": (32, 32), "wide": (32, 64)}
PAIRS = [(model, attention) for model in MODELS for attention in list_attentions()]


def make(model: str, attention: str, shape: str, **settings):
    torch.manual_seed(0)
    return create_model(model, attention, image_size=SHAPES[shape], num_classes=5, **settings)


@pytest.fixture(scope="module", params=[(*pair, shape) for pair in PAIRS for shape in SHAPES], ids="-".join)
def net(request):
    model, attention, shape = request.param
    return make(model, attention, shape), SHAPES[shape]


def test_one_step_reaches_every_parameter(net):
    model, shape = net
    model.train()
    logits, losses = model(torch.randn(3, 3, *shape), return_losses=True)
    assert logits.shape == (3, 5)
    (logits.square().mean() + sum(loss.sum() for loss in losses.values())).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


@torch.no_grad()
@pytest.mark.parametrize("shape", [(48, 40), (40, 96)], ids=["48x40", "40x96"])
def test_another_resolution_at_run_time(net, shape):
    model, _ = net
    assert model.eval()(torch.randn(2, 3, *shape)).isfinite().all()


@torch.no_grad()
def test_samples_of_a_batch_do_not_mix(net):
    model, shape = net
    images = torch.randn(3, 3, *shape)
    torch.testing.assert_close(model.eval()(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", list_attentions())
def test_class_tokens_are_attended_or_refused(attention):
    try:
        model = make("vit_32px", attention, "wide", class_token=True)
    except ValueError as error:
        assert "stage 0 blocks 0-" in str(error) and "set model.class_token=false" in str(error)
        return
    model(torch.randn(2, 3, 32, 64)).sum().backward()
    patches = model.stem.patch_embed.proj.weight.grad
    assert patches is not None and patches.abs().sum() > 0, "the class token does not see the patches"


if __name__ == "__main__":
    rows = [(model, {}) for model in MODELS] + [("vit_32px", {"class_token": True})]
    print("".join(f"{name:>16}" for name in ["", *list_attentions()]))
    for model, settings in rows:
        cells = []
        for attention in list_attentions():
            try:
                for shape in SHAPES:
                    make(model, attention, shape, **settings)(torch.randn(2, 3, *SHAPES[shape])).sum().backward()
                cells.append("trained")
            except ValueError:
                cells.append("refused")
        print("".join(f"{cell:>16}" for cell in [model + "+cls" * bool(settings), *cells]))
