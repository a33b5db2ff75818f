"""Maps of backbones for Grad-CAM, NormGrad and integrated gradients: exact properties, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import create_model, list_attentions, list_models
from models.layers.tokens import to_map
from models.probes.gradcam import gradcam_maps
from models.probes.integrated_gradients import integrated, positive
from models.probes.normgrad import combined, normgrad_maps, of_virtual_layer
from models.probes.reading.maps import chosen_places, maps_through
from models.surgery.any_timm import timm_model

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([1, 3])
VIT = {"dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5, "patch_size": 8}
SWIN = {"dims": [16, 32], "depths": [1, 2], "num_heads": [1, 2], "num_classes": 5}


def model_of(name="vit_32px", **chosen):
    model = create_model(name, **(VIT if name.startswith("vit") else SWIN) | chosen).eval()
    nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("chosen", [{"class_token": True}, {"attention": "agent"}], ids=str)
def test_maps_pass_through_unchanged(chosen):
    model = model_of(**chosen)
    expected, seen = model(IMAGES), {}
    blocks = chosen_places("w", model, "all")
    with maps_through(model, blocks) as places:
        for name, place in places.items():
            place.register_forward_hook(lambda *call, name=name: seen.update({name: call[-1]}))
        assert torch.equal(model(IMAGES), expected)
    assert len(seen) == (2 if "class_token" in chosen else 3)  # behind the last block the class token alone is read
    assert all(x.shape == (2, 32, 4, 4) for x in seen.values())
    seen.clear()
    assert torch.equal(model(IMAGES), expected) and not seen


@pytest.mark.parametrize(("name", "shape"), [("vit_32px", (2, 4, 4)), ("swin_32px", (2, 8, 8))])
def test_gradcam_is_its_formula(name, shape):
    """By hand: the gradient of the logit by the tokens that the head's norm is given, averaged over the map."""
    model = model_of(name)
    blocks = chosen_places("w", model, "last")
    ((place, found),) = gradcam_maps(model, IMAGES, CLASSES, blocks).items()
    assert place == list(chosen_places("w", model, "all"))[-1] and found.shape == shape
    caught = {}
    handle = blocks[place].register_forward_hook(lambda _, given, result: caught.update(x=result[0], grid=given[1]))
    logits = model(IMAGES)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits.gather(1, CLASSES[:, None]).sum(), caught["x"])
    expected = to_map((gradient.mean(1, keepdim=True) * caught["x"]).sum(2, keepdim=True), caught["grid"])[:, 0]
    torch.testing.assert_close(found, expected.clamp(min=0).detach())
    assert found.amax() > 0


def test_normgrad_is_the_norm_of_the_gradient_of_a_layer_that_is_put_there():
    """An identity 1×1 convolution with weights of its own at each position stands behind the block."""
    model = model_of(class_token=True)
    blocks = chosen_places("w", model, 1)
    ((name, found),) = normgrad_maps(model, IMAGES, CLASSES, blocks).items()
    weights = torch.eye(32).repeat(2, 4, 4, 1, 1).requires_grad_()
    with maps_through(model, blocks) as places:
        places[name].register_forward_hook(lambda _m, _g, x: torch.einsum("byxoc,bcyx->boyx", weights, x))
        loss = F.cross_entropy(model(IMAGES), CLASSES, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, weights)
    torch.testing.assert_close(found, gradient.flatten(3).norm(dim=3))


@pytest.mark.parametrize("virtual", ["conv3x3", "scaling", "bias"])
def test_other_virtual_layers_too(virtual):
    """The gradient of one position's weights is that of all where the gradient of the map is zero elsewhere."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(1, 3, 4, 5, generator=generator).double() for _ in range(2))
    layers = {
        "conv3x3": (torch.zeros(3, 3, 3, 3), lambda w: F.conv2d(x, w, padding=1)),
        "scaling": (torch.ones(3), lambda w: x * w.view(1, 3, 1, 1)),
        "bias": (torch.zeros(3), lambda w: x + w.view(1, 3, 1, 1)),
    }
    weight, layer = layers[virtual]
    weight = weight.double().requires_grad_()
    found = of_virtual_layer(x, gradient, virtual)
    for row in range(4):
        for column in range(5):
            alone = torch.zeros_like(gradient)
            alone[..., row, column] = gradient[..., row, column]
            (of_weight,) = torch.autograd.grad(layer(weight), weight, alone)
            torch.testing.assert_close(found[0, row, column], of_weight.norm())


def test_layers_are_combined_on_the_finest_map():
    fine, coarse = torch.rand(1, 4, 4) + 0.1, torch.full((1, 2, 2), 7.0)
    torch.testing.assert_close(combined([fine], "product"), fine / fine.max())
    torch.testing.assert_close(combined([coarse, fine], "product"), (fine / fine.max()).sqrt())
    torch.testing.assert_close(combined([fine, coarse], "sum"), (fine / fine.max() + 1) / 2)


def test_integrated_gradients_sum_to_the_difference_of_the_logits():
    model, baseline = model_of().double(), torch.zeros_like(IMAGES).double()
    found = integrated(model, IMAGES.double(), baseline, CLASSES, 64)
    expected = [model(x).gather(1, CLASSES[:, None])[:, 0] for x in (IMAGES.double(), baseline)]
    torch.testing.assert_close(found.difference, expected[0] - expected[1])
    torch.testing.assert_close(found.attributions.sum((1, 2, 3)) - found.error, found.difference)
    assert found.error.abs().max() < 1e-3 * found.difference.abs().max()
    coarse = integrated(model, IMAGES.double(), baseline, CLASSES, 2)
    assert coarse.error.abs().max() > 10 * found.error.abs().max()


def test_of_a_linear_model_they_are_exact_and_pixels_are_averaged_where_there_are_many():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    found = integrated(model, IMAGES, torch.ones_like(IMAGES), CLASSES, 2)
    expected = (IMAGES - 1) * model[1].weight[CLASSES].view_as(IMAGES)
    torch.testing.assert_close(found.attributions, expected)
    torch.testing.assert_close(positive(found.attributions), expected.sum(1).clamp(min=0))
    large = torch.rand(1, 3, 112, 224)
    assert positive(large).shape == (1, 56, 56)
    torch.testing.assert_close(positive(large).mean(), large.sum(1).mean())


@pytest.mark.parametrize(
    ("chosen", "layers", "text"),
    [
        ({}, "stages.9.blocks.0", r"w: there is no layer 'stages.9.blocks.0'; did you mean .*set probe.layers to last"),
        ({}, 3, r"w: there is no layer 3; set .* a number up to 2, or a name up to stages.3.blocks.0"),
        ({}, [], r"w: no layer is named, got layers=\[\]; set probe.layers=last"),
        (
            {"class_token": True},
            "stages.3.blocks.0",
            r"w: behind stages.3.blocks.0 the class token alone is read, .*; set probe.layers=stages.1.blocks.0",
        ),
        (
            {"class_token": True, "depth": 1},
            "last",
            r"w: behind the only block the class token alone is read, got a ViT",
        ),
        ({"reducer": "top"}, "last", r"w: maps need all tokens, got the reducer Top; leave reducer= out"),
    ],
)
def test_a_layer_that_is_none_is_refused(chosen, layers, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        chosen_places("w", model_of(**chosen), layers)


def test_a_model_without_such_maps_is_refused():
    text = "^w: it looks at maps of a backbone, and Linear says of none where they are; choose probe=integrated_grad"
    with pytest.raises(ValueError, match=text):
        chosen_places("w", nn.Linear(1, 1), "last")


@pytest.mark.parametrize(("layers", "count"), [("all", 3), ("stages", 2), ("last", 1), (-1, 1), ([0, "last"], 2)])
def test_layers_are_chosen_in_order(layers, count):
    found = list(chosen_places("w", model_of("swin_32px"), layers))
    assert len(found) == count and found[-1] == "stages.1.blocks.1" and found == sorted(found)


OF_TIMM = {
    "test_vit": ("blocks.4", (2, 4, 4)),  # behind the last, blocks.5, the class token alone is read
    "test_resnet": ("layer4", (2, 2, 2)),
    "test_mambaout": ("stages.3", (2, 2, 2)),  # channels last
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] * (n != "test_vit")) for n in OF_TIMM])
def test_models_of_timm(name):
    place, shape = OF_TIMM[name]
    model, images = timm_model(name, None, 64, 5).eval(), IMAGES.repeat(1, 1, 2, 2)
    blocks = chosen_places("w", model, "last")
    assert list(blocks) == [place]
    expected = model(images)
    with maps_through(model, blocks):
        assert torch.equal(model(images), expected)
    for maps in (gradcam_maps, normgrad_maps):
        assert maps(model, images, CLASSES, blocks)[place].shape == shape
    assert normgrad_maps(model, images, CLASSES, blocks)[place].amax() > 0
    with pytest.raises(ValueError, match=r"w: there is no layer 'blocks.9'"):
        chosen_places("w", model, "blocks.9")


# those that name a class, and whose tokens have places
ROWS = [name for name in list_models() if name.endswith("_32px") and not name.startswith(("dit", "perceiver"))]
PLACES = [(name, None) for name in ROWS] + [("vit_32px", name) for name in list_attentions()]


@pytest.mark.full
@pytest.mark.parametrize(("name", "attention"), PLACES)
def test_any_backbone_and_any_mechanism(name, attention):
    model = create_model(name, attention, num_classes=5).eval().requires_grad_(False)
    nn.init.normal_(model.head.weight)
    blocks = chosen_places("w", model, "stages")
    gradcams, norms = (maps(model, IMAGES, CLASSES, blocks) for maps in (gradcam_maps, normgrad_maps))
    assert list(gradcams) == list(norms) == list(blocks)
    for gradcam, norm in zip(gradcams.values(), norms.values(), strict=True):
        assert gradcam.shape == norm.shape and gradcam.isfinite().all() and norm.isfinite().all() and norm.amax() > 0
        assert not gradcam.requires_grad and not norm.requires_grad
    found = integrated(model, IMAGES, torch.zeros_like(IMAGES), CLASSES, 4)
    assert found.attributions.isfinite().all() and found.attributions.abs().amax((1, 2, 3)).min() > 0
