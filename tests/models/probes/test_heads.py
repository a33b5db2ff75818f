"""What heads are worth: exact where the answer is known."""

import math

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from conf.errors import UserError
from data.module import ImageData
from data.sources.digits import Digits
from models import create_model, list_attentions
from models.attention import Grid, mixers_of
from models.probes.heads import gateable, heads
from models.probes.reading.head_gates import head_gates, measured, spread, spreads
from models.probes.reading.head_loads import Loads
from models.probes.reading.layers import chosen_layers

FIRST, LAYER = "stages.1.blocks.0.attn", "stages.2.blocks.0.attn"


@pytest.fixture(scope="module")
def given():
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    return ImageData(Digits(), 10, 32, 8, workers=0), trainer


def vit(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = create_model("vit_32px", num_classes=10, depth=2, dim=32, **options).eval()
    for name, parameter in model.named_parameters():  # an initial model hardly tells images apart
        torch.nn.init.normal_(parameter, std=0.0 if name in ("norm.bias", "head.bias") else 0.3)
    return model


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return 2 * torch.randn(count, 3, 1, 1) + torch.randn(count, 3, 32, 32), torch.arange(count) % 10


def test_gates_of_one_change_nothing_and_of_zero_remove_the_head():
    model, (images, _) = vit(), batch(2)
    mixers = dict(mixers_of(model))
    with torch.no_grad(), head_gates(mixers) as gates:
        plain = model(images)
        gates[LAYER] = torch.ones(4)
        torch.testing.assert_close(model(images), plain, rtol=1e-5, atol=1e-5)
        gates[LAYER] = torch.tensor([1.0, 0.0, 1.0, 1.0])
        without = model(images)
        gates.clear()
        mixers[LAYER].proj.weight[:, 8:16] = 0  # what the second of four heads of eight channels gives
        torch.testing.assert_close(model(images), without, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(plain, without, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(model(images), without, rtol=1e-5, atol=1e-5)


def test_a_head_that_gives_nothing_has_no_importance():
    model, (images, _) = vit(), batch(10)
    mixers = dict(mixers_of(model))
    with torch.no_grad():
        mixers[LAYER].proj.weight[:, 16:24] = 0
        labels = model(images).argmax(-1)
    found = measured(model, mixers, [(images[:7], labels[:7]), (images[7:], labels[7:])], Loads(model, 10))
    assert found.images == 10 and found.top1 == 1 and min(found.without[FIRST]) < 1
    assert found.without[LAYER][2] == found.top1 and found.gradient[LAYER][2] == 0
    assert min(found.gradient[LAYER][:2]) > 0


def test_gradients_are_those_of_every_image_by_itself():
    model, (images, labels) = vit(), batch(3)
    mixers, total = dict(mixers_of(model)), torch.zeros(4)
    found = measured(model, mixers, [(images, labels)], Loads(model, 10)).gradient[LAYER]
    with head_gates(mixers) as gates:
        for image, label in zip(images, labels, strict=True):
            gates[LAYER] = torch.ones(4, requires_grad=True)
            total += torch.autograd.grad(F.cross_entropy(model(image[None]), label[None]), gates[LAYER])[0].abs()
    assert found == pytest.approx((total / 3).tolist(), rel=1e-4)


def test_entropy_and_distance_of_known_weights():
    uniform, itself = torch.full((1, 1, 5, 5), 0.2), torch.eye(5)[None, None]
    entropy, distance = spread(torch.cat([uniform, itself, -itself], dim=1), Grid(2, 2, 1), (8, 12))
    assert entropy.tolist() == pytest.approx([math.log(5), 0, 0])
    # cells are 4 pixels high and 6 wide: to itself 0, beside 6, below 4, across √52
    assert distance.tolist() == pytest.approx([(6 + 4 + math.sqrt(52)) / 4, 0, 0], abs=1e-5)


def test_the_load_of_each_class_is_that_of_its_images():
    model, (images, labels) = vit(attention="moh", shared_heads=1, routed_heads=2), batch(5)
    loads = Loads(model, 10)
    for part in (slice(0, 2), slice(2, 5)):
        with loads.of(labels[part]), torch.no_grad():
            model(images[part])
    of_classes = loads.of_classes()
    (first, second), mean = loads.layers(), of_classes[LAYER][:5].mean(0)
    assert (first.name, second.name) == (FIRST, LAYER) and of_classes[LAYER][5:].isnan().all()
    assert second.load == pytest.approx(mean.tolist()) and second.load[0] == 1
    assert sum(second.load[1:]) == pytest.approx(2) and 0 < second.entropy <= 1


def test_the_report_of_gated_heads(given):
    report = heads(vit(attention="moh", shared_heads=1, routed_heads=2), *given, images=1, limit=12)
    assert list(report.pictures) == ["heads", "loads", "loads-by-class"] == list(report.captions)
    table = report.tables["heads"]
    kinds = [(row["layer"], row["head"], row["kind"]) for row in table]
    assert kinds[:2] == [(FIRST, 0, "shared"), (FIRST, 1, "routed")]
    assert len(table) == 8 and table[0]["load"] == 1 and table[0]["entropy"] > 0
    assert table[0]["drop"] == pytest.approx(report.figures["top1"] - table[0]["top1_without"])
    assert report.figures["images"] == 12 and report.lines == [
        "accuracy, gradients and loads of 12 of 360 validation images"
    ]
    assert len(report.tables["loads"]) == 6 and report.tables["loads"][0].keys() > {"layer", "head", "0"}
    assert report.figures[f"{LAYER}/3/load"] == table[-1]["load"]


def test_what_has_no_matrix_has_the_rest(given):
    model = vit(attention="conv")
    report = heads(model, *given, images=1, limit=4, layers=-1)
    (line,) = report.lines[1:]
    assert line == f"without weights of tokens on tokens, hence no entropy: {LAYER}"
    assert list(report.pictures) == ["heads"] and report.tables["heads"][0]["entropy"] is None
    assert spreads(model, dict(mixers_of(model)), batch(1)[0]) == {}


@pytest.mark.full
@pytest.mark.parametrize("attention", list_attentions())
def test_every_mechanism_with_gates(attention):
    """What takes none is refused; what has no weights of tokens on tokens has no entropy."""
    model, (images, labels) = vit(attention=attention), batch(2)
    mixers = {LAYER: dict(mixers_of(model))[LAYER]}
    if not mixers[LAYER].accepts.gates:
        with pytest.raises(UserError, match=r"heads: .* heads to be left out"):
            chosen_layers("heads", model, "all", gateable, "heads to be left out", "a model with e.g. softmax")
        return
    with torch.no_grad(), head_gates(mixers) as gates:
        plain = model(images)
        gates[LAYER] = torch.ones(4)
        torch.testing.assert_close(model(images), plain, rtol=1e-3, atol=1e-3)
        gates[LAYER] = torch.zeros(4)
        assert not torch.allclose(model(images), plain, rtol=1e-3, atol=1e-3)
    found = measured(model, mixers, [(images, labels)], Loads(model, 10))
    assert all(0 <= value < math.inf for value in found.gradient[LAYER]) and max(found.gradient[LAYER]) > 0
    spread_out = spreads(model, mixers, images)
    assert (LAYER in spread_out) == mixers[LAYER].has_matrix
    for of_heads in spread_out.values():
        assert all(0 <= value <= math.log(64) + 1e-4 for value in of_heads.entropy)
        assert all(0 <= value <= 28 * math.sqrt(2) for value in of_heads.distance)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"limit": 0}, "probe: limit must be a whole number of at least 1, got 0; set probe.limit=500"),
        ({"images": 1.5}, "probe: images must be a whole number of at least 1, got 1.5"),
        ({"layers": 7}, "heads: there is no layer 7"),
    ],
)
def test_what_cannot_be_asked(given, options, text):
    with pytest.raises(UserError) as error:
        heads(vit(), *given, **options)
    assert text in str(error.value)


def test_what_generates_images(given):
    with pytest.raises(UserError, match="heads: DiT generates images, so it is shown none; choose a classifier"):
        heads(create_model("dit_s_2", depth=1), *given)
