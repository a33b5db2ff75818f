"""MEDUSA: one body for all stages, gates behind each, open gates, what it sees, and models without maps."""

import pytest
import torch
import torch.nn.functional as F

from models import create_model
from models.backbones.base import Backbone
from models.layers.tokens import to_map
from models.surgery.transplant import transplanted
from models.wrappers.medusa import EncoderDecoder

MADE = {"_target_": "models.wrappers.medusa.Medusa", "_partial_": True}
MODELS = {
    "swin_32px": {"depths": [1, 1, 1, 1], "dims": [16, 32, 32, 32]},
    "convnext_32px": {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32]},
    "vit_32px": {"depth": 4, "dim": 32, "class_token": True},
}
BACKBONES = [
    *MODELS,
    pytest.param("resnet_32px", marks=pytest.mark.full),
    pytest.param("coatnet_32px", marks=pytest.mark.full),
]


def made(name: str, **options) -> Backbone:
    torch.manual_seed(0)
    return create_model(name, num_classes=5, **MODELS.get(name, {}) | options).eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_every_stage_goes_on_with_what_the_one_map_leaves(name):
    model, x = made(name, wrapper="medusa"), images(2, 3, 32, 48)
    attention = model.wrapper.body(x)
    assert attention.shape == (2, 1, 16, 24)
    tokens, grid, *given = model.stem(x)
    for stage, head in zip(model.stages, model.wrapper.heads, strict=True):
        tokens, grid, _, _ = stage(tokens, grid, *given, carry={})
        gates = torch.sigmoid(head(F.adaptive_avg_pool2d(attention, grid[:2])))
        gated = to_map(tokens, grid) * gates
        tokens = torch.cat([tokens[:, : grid.prefix], gated.flatten(2).mT], dim=1)
        assert 0 < gates.min() < gates.max() < 1
    expected = model.classify(*model.finished(tokens, grid))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_open_gates_leave_the_model_as_it_is(name):
    model, x = made(name, wrapper="medusa"), images(2, 3, 32, 32)
    plain = made(name)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("wrapper.")})
    assert not torch.allclose(model(x), plain(x), atol=1e-3)
    for head in model.wrapper.heads:
        head.weight.zero_()
        head.bias.fill_(40)
    torch.testing.assert_close(model(x), plain(x))


def test_gates_of_every_stage_teach_the_body():
    model = made("swin_32px", wrapper="medusa")
    for stage in range(4):
        model.zero_grad()
        for number, head in enumerate(model.wrapper.heads):
            head.weight.data.fill_(float(number == stage))
        model(images(2, 3, 32, 32)).square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in model.wrapper.body.parameters() if p.ndim > 1)


def test_a_gate_depends_on_the_whole_image():
    body, x = EncoderDecoder(3, 8, 2).double(), images(1, 3, 64, 48).double().requires_grad_()
    (seen,) = torch.autograd.grad(body(x)[0, 0, 0, 0], x)
    assert (seen.abs().amax((0, 1)) > 0).all()


@torch.no_grad()
def test_images_of_one_channel_and_of_odd_sizes():
    model = made("vit_32px", wrapper="medusa", in_channels=1)
    assert model(images(2, 1, 33, 31)).shape == (2, 5)


def test_weights_without_a_wrapper_start_one_with_it():
    model = made("swin_32px", wrapper="medusa")
    found = transplanted(made("swin_32px").state_dict(), model)
    assert {name.partition(".")[0] for name in found.new} == {"wrapper"} and not found.dropped


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "vit_32px",
            {"wrapper": {**MADE, "width": 0}},
            r"medusa: width must be a whole number of at least 1",
        ),
        (
            "vit_32px",
            {"wrapper": {**MADE, "levels": 0}},
            r"medusa: levels must be a whole number of at least 1",
        ),
        (
            "vit_32px",
            {"wrapper": "medusa", "reducer": "top"},
            r"medusa: it gates .*, got the reducer Top, whose tokens",
        ),
        ("perceiver_32px", {"wrapper": "medusa"}, r"medusa: it gates the map behind every stage, got Perceiver, whose"),
        ("dit_s_2", {"wrapper": "medusa"}, r"wrapper: it stands around a model that images go through, got DiT"),
    ],
    ids=["width", "levels", "reducer", "latents", "generates"],
)
def test_what_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, num_classes=5, **options)
