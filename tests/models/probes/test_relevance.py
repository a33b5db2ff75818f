"""Relevance for a class, from attention weights and their gradients."""

import re

import pytest
import reference
import torch
from torch import nn

from conf.errors import UserError
from conf.names import options
from models import create_model, list_attentions
from models.checkpoints import convert
from models.probes.deletion import deletion_curve
from models.probes.reading.paths import followed
from models.probes.relevance import relevance_maps
from models.probes.rollout import rollout_maps

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {"dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, "patch_size": 8}
CLASSES = torch.tensor([1, 3])


@pytest.mark.parametrize("name", [name for name in reference.cases() if name.startswith("attribution/")])
def test_the_map_is_that_of_the_authors(name):
    h = reference.info(name)["hparams"]
    shape = {"image_size": h["img_size"], "patch_size": h["patch_size"], "num_classes": h["num_classes"]}
    shape |= {"dim": h["embed_dim"], "depth": h["depth"], "num_heads": h["num_heads"], "mlp_ratio": h["mlp_ratio"]}
    model = create_model("vit_tiny", **shape).eval()
    model.load_state_dict(convert(reference.weights(name), "vit_tiny", **shape))
    image, layers = reference.model_input(name), followed("relevance", model, "last")
    found = relevance_maps(model, image, torch.tensor([h["class_index"]]), layers)
    assert reference.compare(name, "map_generic", found.map_BYX.flatten(1)) < 1e-4
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "chosen", "stages"),
    [
        ("vit_32px", SMALL | {"class_token": True}, "last"),
        ("vit_32px", SMALL | {"layout": "stripes", "weights": "sigmoid"}, "last"),
        ("swin_32px", {"num_classes": 5}, "all"),
        ("pvt_32px", {"num_classes": 5, "class_token": True}, "all"),
        ("vit_32px", SMALL | {"attention": "moh"}, "last"),
        ("vit_32px", SMALL | {"attention": "inline"}, "last"),
    ],
    ids=str,
)
def test_it_is_positive_depends_on_the_class_and_not_on_other_images(name, chosen, stages):
    model = create_model(name, **chosen).eval().requires_grad_(False)
    torch.nn.init.normal_(model.head.weight)
    layers = followed("relevance", model, stages)
    found = relevance_maps(model, IMAGES, CLASSES, layers).map_BYX
    assert (found >= 0).all() and (found.amax((1, 2)) > 1e-6).all()
    alone = relevance_maps(model, IMAGES[1:], CLASSES[1:], layers).map_BYX
    torch.testing.assert_close(found[1:], alone, rtol=1e-3, atol=1e-6)
    other = relevance_maps(model, IMAGES, CLASSES - 1, layers).map_BYX
    assert (found - other).abs().amax((1, 2)).min() > 0.01 * found.amax()


@pytest.mark.full
@pytest.mark.parametrize(
    ("attention", "layout"),
    [*((name, None) for name in list_attentions()), *(("softmax", name) for name in options("attention/layout"))],
)
def test_every_mechanism_and_layout_is_followed_or_refused_by_name(attention, layout):
    parts = {} if layout is None else {"layout": layout}
    model = create_model("vit_32px", attention, **SMALL | {"num_heads": 4, "patch_size": 4} | parts).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.ones_(module.weight)  # one that starts at zero shuts its branch
    for who, maps_of in (
        ("relevance", lambda layers: relevance_maps(model, IMAGES[:1], CLASSES[:1], layers)),
        ("rollout", lambda layers: rollout_maps(model, IMAGES[:1], layers)),
    ):
        try:
            found = maps_of(followed(who, model, "last", stochastic=who == "rollout")).map_BYX
        except UserError as error:
            assert re.match(rf"{who}: .*stages\.\d\.blocks\.0\.attn \(\w+\) .*; choose .*probe=", str(error))
            continue
        assert found.shape == (1, 8, 8) and (found >= 0).all() and found.amax() > 0
        assert who == "relevance" or found.sum().item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.full
def test_what_is_relevant_is_what_the_class_needs(digits_vit):
    model, images, labels = digits_vit
    images, labels = images[:64], labels[:64]
    found = relevance_maps(model, images, labels, followed("relevance", model, "last"))
    curves = deletion_curve(model, images, labels, found.map_BYX)
    assert curves["most"][2] < curves["random"][2] - 0.2 < curves["least"][2] - 0.2
