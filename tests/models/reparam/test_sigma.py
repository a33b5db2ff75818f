"""σReparam: what it fixes and forgets, when u moves, and what it refuses."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

from models.attention.softmax import softmax_attention
from models.backbones.base import Pyramid
from models.backbones.vit import ViT
from models.reparam import adopt, fold
from models.reparam.sigma import sigma


def vit(image_size=16, **options):
    sizes = {"patch_size": 4, "dim": 16, "depth": 4, "num_heads": 2}
    return ViT(softmax_attention, image_size, 5, **sizes, **options)


def us(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith("0.u")}


def moved(before: dict, after: dict) -> bool:
    return all(not torch.equal(before[name], after[name]) for name in before if before[name].numel() > 1)


def disturb(model: nn.Module) -> None:
    """Other weights, as after a step of an optimizer, for which u is no longer the singular vector."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def test_the_norm_is_sigma_and_the_scale_of_the_weight_is_forgotten():
    layer = nn.Linear(12, 7).double()
    start = torch.linalg.matrix_norm(layer.weight, 2).detach()
    sigma(layer)
    layer.parametrizations.weight[0].sigma.data.fill_(1.7)
    torch.testing.assert_close(torch.linalg.matrix_norm(layer.weight, 2), torch.tensor(1.7).double())
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight.original *= 5
    torch.testing.assert_close(layer.weight, before)
    assert start != 1.7


def test_the_function_at_the_start_is_that_of_the_plain_model():
    model, images = vit().eval(), torch.randn(2, 3, 16, 16)
    before = model(images)
    sigma(model)
    torch.testing.assert_close(model(images), before)


def test_u_moves_once_per_forward_in_training_whatever_is_recomputed_or_read_twice():
    images, steps = torch.randn(2, 3, 16, 16), []
    once = vit(reparam=sigma)
    disturb(once)
    twice = deepcopy(once)
    twice.set_gradient_checkpointing(True)
    for model in (once, twice):
        before = us(model)
        model.train()(images).square().mean().backward()
        steps.append(us(model))
        assert moved(before, steps[-1])
    assert all(torch.equal(steps[0][name], steps[1][name]) for name in steps[0])
    for one, other in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    before = us(once)
    once.eval()(images)
    assert once.stages[0].blocks[0].attn.qkv.weight.isfinite().all()  # a read outside of a forward pass
    assert all(torch.equal(before[name], value) for name, value in us(once).items())


def test_u_moves_in_the_copy_that_is_trained_and_in_the_pyramid():
    model = vit(reparam=sigma)
    disturb(model)
    copy, before = deepcopy(model), us(model)
    copy.train()(torch.randn(2, 3, 16, 16))
    assert all(torch.equal(before[name], value) for name, value in us(model).items())
    assert moved(before, us(copy))
    pyramid = Pyramid(model).train()
    before = us(pyramid)
    pyramid(torch.randn(2, 3, 16, 16))
    assert moved(before, us(pyramid))


def test_a_loaded_model_goes_on_bit_for_bit():
    model, other, images = vit(reparam=sigma).train(), vit(reparam=sigma).train(), torch.randn(2, 3, 16, 16)
    disturb(model)
    model(images)
    disturb(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(images), other(images))
    assert all(torch.equal(value, us(other)[name]) for name, value in us(model).items())


def test_two_forward_passes_before_one_backward_pass():
    model = vit(reparam=sigma).train()
    images = torch.randn(2, 3, 16, 16)
    (model(images).mean() + model(images).mean()).backward()


def test_training_and_evaluation_are_one_function_and_fold_keeps_it():
    model, images = vit(reparam=sigma), torch.randn(2, 3, 16, 16)
    disturb(model)
    evaluated = model.eval()(images)
    copy = deepcopy(model)
    torch.testing.assert_close(copy.train()(images), evaluated)
    fold(model.train())  # what the next forward pass would have used
    torch.testing.assert_close(model(images), evaluated, rtol=1e-6, atol=1e-6)
    assert model.state_dict().keys() == vit().state_dict().keys()
    model.train()(images).mean().backward()


def test_folding_a_copy_leaves_the_original():
    model, images = vit(reparam=sigma).eval(), torch.randn(2, 3, 16, 16)
    logits, names, copy = model(images), model.state_dict().keys(), deepcopy(model)
    fold(copy)
    assert torch.equal(model(images), logits) and model.state_dict().keys() == names
    torch.testing.assert_close(copy(images), logits)
    fold(model)
    torch.testing.assert_close(model(images), logits)


def test_sigma_does_not_decay():
    from timm.optim import create_optimizer_v2

    model = vit(reparam=sigma)
    optimizer = create_optimizer_v2(model, opt="adamw", weight_decay=0.1, layer_decay=0.5)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    rate = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    sigmas = [p for name, p in named.items() if name.endswith("0.sigma")]
    assert len(sigmas) == 4 * 4 + 2 and all(decay[id(p)] == 0 for p in sigmas)
    at = "attn.qkv.parametrizations.weight.original"
    first, last = (rate[id(named[f"stages.{stage}.blocks.0.{at}"])] for stage in (0, 3))
    assert last == 8 * first


def test_a_plain_models_weights_are_adopted():
    plain, model, images = vit().eval(), vit(reparam=sigma).eval(), torch.randn(2, 3, 16, 16)
    adopt(model, plain.state_dict())
    torch.testing.assert_close(model(images), plain(images))


def test_options():
    model = vit(reparam=partial(sigma, only=["qkv", "attn.proj"], norms="removed"))
    named = {name.partition(".parametrizations")[0] for name in model.state_dict() if "original" in name}
    assert len(named) == 8 and all(name.endswith(("qkv", "attn.proj")) for name in named)
    assert not [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert not hasattr(vit(reparam=partial(sigma, skip=["head"])).head, "parametrizations")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"norms": "gone"}, "sigma: norms must be one of kept, removed, got 'gone'; set reparam.norms"),
        ({"only": "qkv"}, "sigma: only must be a list of names of modules, got 'qkv'; set reparam.only=.qkv."),
        ({"conv_gain": 0}, "sigma: conv_gain must be a number of at least 1e-06, got 0; set reparam.conv_gain=1.0, or"),
        ({"skip": None}, "sigma: skip must be a list of names of modules, got None; set reparam.skip"),
        ({"only": ["query"]}, r"sigma: no linear layer .* has such a name, got only=\('.query',\); set reparam.only"),
    ],
)
def test_wrong_options_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        vit(reparam=partial(sigma, **options))


def test_a_weight_that_starts_at_zero_is_refused():
    model = vit()
    nn.init.zeros_(model.head.weight)
    with pytest.raises(ValueError, match="a weight that starts at zero has no spectral norm, got head; add it to rep"):
        sigma(model)
    sigma(model, skip=["head"])


@pytest.mark.full
def test_compiles_as_one_graph():
    model, images = vit(reparam=partial(sigma, only=["qkv"])).train(), torch.randn(2, 3, 16, 16)
    disturb(model)
    eager = deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(images), eager(images))
    for name, value in us(eager).items():
        torch.testing.assert_close(us(model)[name], value)
