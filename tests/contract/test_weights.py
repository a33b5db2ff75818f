"""Every reparam, initializer and adapter, and every key of the blocks, on a backbone of each kind.

They run, at another resolution too; every trained parameter gets a gradient; samples are independent; weights are saved
and loaded; folded weights give the same; wrong values are refused by the name of their key.
"""

from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import nn

from conf import names
from conf.compose import compose_run
from models import create_model
from models.reparam import fold, is_reparametrised
from models.reparam.sigma import NORMALISING

SMALL = {
    "vit_32px": {"depth": 4, "dim": 32},
    "swin_32px": {"depths": [1, 1, 1, 1], "dims": [16, 32, 32, 32]},
    "convnext_32px": {"attention": "softmax", "depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32]},
    "coatnet_32px": {"depths": [1, 2, 1], "stem_dim": 16, "dims": [16, 16, 32]},
}
KEYS = {
    "activation": ["gelu", "relu", "relu2", "silu", "topk", {"name": "topk", "k": 3}, "swiglu"],
    "norm": ["layernorm", "rmsnorm"],
    "wiring": ["sequential", "parallel", "rk4"],
    "downsample": ["deformable"],
}
REFUSED = {("vit_32px", "downsample", "deformable")} | {("convnext_32px", "wiring", w) for w in ("parallel", "rk4")}
CHOICES = [(group, member) for group in ("reparam", "initializer", "adapter") for member in names.options(group)]
CHOICES += [(key, value) for key, values in KEYS.items() for value in values]
# make test: everything on a ViT, and each on one of the others
PAIRS = [
    pytest.param(
        model, *choice, id=f"{model}-{choice[0]}-{choice[1]}",
        marks=[] if model == "vit_32px" or place % 3 == index - 1 else pytest.mark.full,
    )
    for index, model in enumerate(SMALL)
    for place, choice in enumerate(CHOICES)
    if (model, *map(str, choice)) not in REFUSED
]  # fmt: skip


def built(model: str, **chosen: object) -> nn.Module:
    torch.manual_seed(1)
    return create_model(model, num_classes=5, **SMALL[model], **chosen).eval()


@cache
def plain(model: str) -> nn.Module:
    return built(model)


@pytest.mark.parametrize(("model", "key", "value"), PAIRS)
def test_it_runs_is_trained_saved_and_loaded(model, key, value, tmp_path):
    net, images = built(model, **{key: value}), torch.randn(3, 3, 32, 32)
    logits = net(images)
    logits.square().mean().backward()
    lacking = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking and torch.isfinite(logits).all()
    torch.testing.assert_close(net(images[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)  # another order of summation
    assert net(torch.randn(1, 3, 48, 32)).shape == (1, 5)
    other = deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(images), net(images))


@pytest.mark.parametrize(("key", "value"), [c for c in CHOICES if c[0] in names.PLACES])
def test_names_and_shapes_depend_on_no_value(key, value):
    net = built("vit_32px", **{key: value})
    with torch.device("meta"):
        meta = built("vit_32px", **{key: value})
    assert {k: v.shape for k, v in meta.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}


@pytest.mark.parametrize(
    ("model", "key", "value"), [pair for pair in PAIRS if pair.values[1] in ("reparam", "adapter")]
)
def test_folded_weights_are_plain_and_give_the_same(model, key, value):
    net, images = built(model, **{key: value}), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    logits = net(images)
    assert is_reparametrised(net)
    fold(net)
    assert not is_reparametrised(net)
    torch.testing.assert_close(net(images), logits, rtol=1e-6, atol=1e-6)
    removed = {name for name, module in plain(model).named_modules() if type(module) in NORMALISING}
    without = removed if value == "sigma_vit" else set()
    expected = {key for key in plain(model).state_dict() if key.rpartition(".")[0] not in without}
    assert net.state_dict().keys() == expected
    plain(model).load_state_dict(net.state_dict(), strict=not without)


@pytest.mark.parametrize(("key", "value"), [c for c in CHOICES if c[0] == "initializer"])
def test_the_generator_of_torch_decides(key, value):
    one, other = (built("vit_32px", **{key: value}).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], value) for name, value in plain("vit_32px").state_dict().items())


@pytest.mark.parametrize(
    ("model", "chosen", "text"),
    [
        ("vit_32px", {"activation": "swish"}, "ViT: activation must be one of gelu, .*, got 'swish'; set model.activ"),
        (
            "vit_32px",
            {"norm": "groupnorm"},
            "ViT: norm must be one of layernorm, rmsnorm, got 'gro.*; set model.norm",
        ),
        (
            "vit_32px",
            {"wiring": "ring"},
            "ViT: wiring must be one of sequential, parallel, rk4, got 'ring'; set mod",
        ),
        (
            "vit_32px",
            {"downsample": "max"},
            "ViT: downsample must be one of deformable, got 'max'; set model.d",
        ),
        ("vit_32px", {"downsample": "deformable"}, "ViT: nothing between its stages only halves the map, got down"),
        (
            "convnext_32px",
            {"wiring": "parallel"},
            "ConvNeXt: ConvNeXtBlock is no block of two branches .*, got wiring=",
        ),
        ("vit_32px", {"reparam": "sigmas"}, "there is no reparam 'sigmas'; did you mean 'sigma'"),
        ("vit_32px", {"initializer": "mime"}, "there is no initializer 'mime'; did you mean 'mimetic'"),
    ],
)
def test_what_cannot_be_is_refused(model, chosen, text):
    with pytest.raises(ValueError, match=text):
        built(model, **chosen)


def test_nothing_may_be_chosen_by_name():
    chosen = [f"{names.group_of(key)}=none" for key in (*names.PLACES, *names.PARTS)]
    assert compose_run(["model=vit_32px", *chosen])[0].model == compose_run(["model=vit_32px"])[0].model
    assert is_reparametrised(built("vit_32px", gate=None, weights=None, reparam="sigma"))


def test_null_is_no_name(command):
    status, _, err = command("train", "-m", "reparam=null,sigma")
    assert status == 2 and "reparam: must be a name, got null,sigma; give reparam=none for nothing, or leave it" in err


@pytest.mark.parametrize("key", ["mimetic", "gpsa"])
def test_an_initializer_refuses_mixers_without_its_projections_and_passes_over_convolutions(key):
    text = rf"{key}: mixers must have one projection .*, got stages.*; choose attention=softmax, or initializer=none"
    with pytest.raises(ValueError, match=text):
        built("vit_32px", attention="conv", initializer=key)
    with pytest.warns(UserWarning, match="every mixer of the model is a convolution, so nothing was changed"):
        create_model("convnext_32px", depths=[1, 1, 1, 1], initializer=key)
