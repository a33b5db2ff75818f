"""Relevance through a ViT: what the authors' code gave, and that none is lost or depends on other images."""

import pytest
import reference
import torch

from models import create_model
from models.checkpoints import convert
from models.probes.reading import relprop
from models.probes.reading.propagation import attribution_map, check_propagates, last_layer_map, propagate

TOLERANCE = 1e-4  # relative; of the case, whose float32 and float64 differ by 7e-5
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SMALL = {"dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5, "patch_size": 8}


def small(**chosen):
    return create_model("vit_32px", **SMALL | {"class_token": True} | chosen).eval().double()


@pytest.mark.parametrize("name", [name for name in reference.cases() if name.startswith("attribution/")])
def test_the_maps_are_those_of_the_authors(name):
    h = reference.info(name)["hparams"]
    shape = {"image_size": h["img_size"], "patch_size": h["patch_size"], "num_classes": h["num_classes"]}
    shape |= {"dim": h["embed_dim"], "depth": h["depth"], "num_heads": h["num_heads"], "mlp_ratio": h["mlp_ratio"]}
    model = create_model("vit_tiny", **shape).eval()
    model.load_state_dict(convert(reference.weights(name), "vit_tiny", **shape))
    found = propagate(model, reference.model_input(name), torch.tensor([h["class_index"]]))
    maps = {
        "map_transformer_attribution": attribution_map(found, h["start_layer"])[:, 0, 1:],
        "map_last_layer": last_layer_map(found)[0, 0, 1:],
        "map_full": found.pixels,
        "attention_gradient_norms": torch.stack([gradient.norm() for gradient in found.gradients]),
    }
    assert {
        key: error for key, value in maps.items() if (error := reference.compare(name, key, value)) > TOLERANCE
    } == {}


@pytest.mark.parametrize("chosen", [{}, {"class_token": False}, {"layer_scale": 0.1, "norm": "rmsnorm"}], ids=str)
def test_no_relevance_is_lost_on_the_way(chosen):
    found = propagate(small(**chosen), IMAGES, torch.tensor([1, 3]))
    torch.testing.assert_close(found.sums, torch.ones_like(found.sums), rtol=1e-6, atol=0)


def test_two_images_at_once_are_one_by_one_unless_coupled():
    model, classes = small(), torch.tensor([1, 3])
    both = propagate(model, IMAGES, classes)
    for i in range(2):
        alone = propagate(model, IMAGES[i : i + 1], classes[i : i + 1])
        torch.testing.assert_close(both.pixels[i : i + 1], alone.pixels)
        torch.testing.assert_close(attribution_map(both)[i], attribution_map(alone)[0])
        torch.testing.assert_close(propagate(model, IMAGES[i : i + 1], classes[i : i + 1], True).pixels, alone.pixels)
    coupled = propagate(model, IMAGES, classes, coupled=True)
    assert (coupled.sums - 1).abs().max() > 0.01  # of one image; nothing is lost in all
    torch.testing.assert_close(coupled.sums.sum(0), torch.full((3,), 2.0).double())
    assert (coupled.pixels - both.pixels).norm() > 0.02 * both.pixels.norm()


def test_the_sum_keeps_what_it_is_given_and_a_product_is_halved():
    a, b, relevance = (torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    for parts in (relprop.added(a, b, relevance), relprop.product(a, b, relevance)):
        total = sum(part.sum((1, 2)) for part in parts)
        torch.testing.assert_close(total, relevance.sum((1, 2)), rtol=1e-5, atol=1e-6)
    of_a, of_b = relprop.product(a, b, relevance)
    torch.testing.assert_close(of_a.sum((1, 2)), of_b.sum((1, 2)), rtol=1e-5, atol=1e-6)
    assert relprop.share(torch.ones(1), torch.zeros(1)) == 0


@pytest.mark.parametrize(
    ("name", "chosen", "what"),
    [
        ("swin_32px", {}, "Swin"),
        ("vit_32px", {"attention": "agent"}, "AgentCore in stages.0.blocks.0"),
        ("vit_32px", {"layout": "grid"}, "layout Dilated in stages"),
        ("vit_32px", {"bias": "kerple"}, "Kerple in stages"),
        ("vit_32px", {"pool": "simpool"}, "pool SimPool"),
        ("vit_32px", {"wiring": "parallel"}, "wiring=parallel in stages"),
        ("vit_32px", {"wiring": "rk4"}, "wiring=rk4 in stages"),
        ("vit_32px", {"gate": "eca"}, "gate ECA in stages"),
    ],
)
def test_a_part_without_a_rule_is_refused_by_name(name, chosen, what):
    with pytest.raises(ValueError, match=rf"^attribution: relevance has rules .* alone, got {what}.*; choose probe="):
        check_propagates("attribution", create_model(name, **chosen))
