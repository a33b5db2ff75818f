"""What every model of conf/model must do; a new row there is tested without a new line here.

Models for 32 pixels run; the others are built, and run for their shapes, on the meta device.
"""

import copy

import pytest
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

from conf import families
from models import create_model
from models.backbones.base import Backbone, pair
from models.factory import compose_model, instantiate

ROWS = families.models()
SMALL = families.small()
LARGE = [name for name in ROWS if name not in SMALL]


def build(name: str, attention=None, **settings) -> Backbone:
    """A small model, with an attention factory in place of its own when one is given."""
    torch.manual_seed(0)
    cfg = compose_model(name)
    if attention is not None:
        cfg.attention = None
        settings["attention"] = attention
    return instantiate(cfg.model, num_classes=7, **settings)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# Families with a backbone of their own. The others are mechanisms in these, which tests/models/test_tables.py runs once
# for their costs; of DiT, which generates: tests/models/backbones/test_dit.py.
COMMON = {family: table.get("common", {}).get("model", {}) for family, table in families.tables().items()}
OWN = [name for name, row in ROWS.items() if "_target_" in COMMON[row["family"]] and row["family"] != "dit"]
CONSTANT = ("patchconvnet", "xcit")  # families with the same drop path in all blocks
# the branches of a block share a rate, and none has a scale; or scales have biases, and norms a gamma: their own tests
SHARED = ("medvit_32px", "overlock_32px")
LATENT = ("perceivers",)  # families whose tokens have no places on the image
# The small one of each; the rest differs in numbers and takes minutes.


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SMALL else pytest.mark.full) for n in OWN])
def test_shapes(name):
    """Parameters, channels and strides, and logits, on the meta device at the model's own image size."""
    size = pair(compose_model(name).image_size)
    with torch.device("meta"):
        model = create_model(name, num_classes=11).eval()
        x = torch.empty(2, 3, *size)
        logits = model(x)
        maps = [] if model.latent else model.forward_pyramid(x)
    assert sum(p.numel() for p in model.parameters()) > 0
    assert logits.shape == (2, 11) and model.latent == (ROWS[name]["family"] in LATENT)
    if model.latent:
        assert len(model.channels) == len(model.stages) and model.strides == []
        return
    assert len(maps) == len(model.channels) == len(model.strides)
    for feature, channels, stride in zip(maps, model.channels, model.strides, strict=True):
        assert feature.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize("name", [name for name in LARGE if ROWS[name]["family"] in ("swin", "convnext", "coatnet")])
def test_pyramids_of_the_large_models_have_the_usual_strides(name):
    with torch.device("meta"):
        assert create_model(name).strides == [4, 8, 16, 32]


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 40)])
@pytest.mark.parametrize("name", SMALL)
def test_any_image_size(name, size):
    model, x = build(name).eval(), images(2, 3, *size)
    logits = model(x)
    assert logits.shape == (2, 7) and logits.isfinite().all()
    if model.latent:
        return
    for feature, stride in zip(model.forward_pyramid(x), model.strides, strict=True):
        assert feature.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize("name", SMALL)
def test_the_right_and_bottom_edge_count(name):
    """Padding to whole cells loses no pixel of an odd image."""
    model, x = build(name).eval(), images(1, 3, 35, 37)
    changed = x.clone()
    changed[..., -1, -1] += 5
    assert not torch.equal(model(x), model(changed))


@pytest.mark.parametrize("name", SMALL)
def test_an_image_is_judged_alone_and_in_any_memory_format(name):
    model, x = build(name).eval(), images(3, 3, 32, 32)
    logits = model(x)
    torch.testing.assert_close(model(x[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        channels_last(x.contiguous(memory_format=torch.channels_last)), logits, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_learns(name):
    model = build(name).train()
    model(images(4, 3, 32, 32)).square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not dead


@pytest.mark.parametrize("name", SMALL)
def test_the_chosen_attention_is_used_and_its_losses_come_back(name, recorder):
    model = build(name, recorder).train()
    assert len(recorder.sites) > 0
    logits, losses = model(images(2, 3, 32, 32), return_losses=True)
    assert logits.shape == (2, 7)
    assert losses["size"].shape == (len(recorder.sites),)
    losses["size"].sum().backward()
    mixers = [m for m in model.modules() if isinstance(m, type(recorder(recorder.sites[0])))]
    assert all(m.proj.weight.grad.abs().sum() > 0 for m in mixers)


@pytest.mark.parametrize("name", SMALL)
def test_gradient_checkpointing_changes_nothing(name, recorder):
    results = []
    for enabled in (False, True):
        model = build(name, recorder, drop_path=0.3).train()
        model.set_gradient_checkpointing(enabled)
        torch.manual_seed(3)
        logits, losses = model(images(2, 3, 32, 32), return_losses=True)
        (logits.square().sum() + losses["size"].sum()).backward()
        tensors = {"logits": logits, **losses, **{n: p.grad for n, p in model.named_parameters()}}
        results.append({**tensors, **dict(model.named_buffers())})
    assert set(results[0]) == set(results[1])
    for key, expected in results[0].items():
        torch.testing.assert_close(
            results[1][key], expected, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", SMALL)
def test_gradient_checkpointing_recomputes(name, recorder):
    """Every mixer runs a second time in the backward pass, and not in evaluation."""
    model, calls = build(name, recorder), []
    for module in model.modules():
        if type(module).__name__ == "_Recorded":
            module.register_forward_hook(lambda *_: calls.append(1))
    model.set_gradient_checkpointing(True)
    model.train()(images(2, 3, 32, 32)).sum().backward()
    assert len(calls) == 2 * len(recorder.sites)
    model.eval()(images(2, 3, 32, 32)).sum().backward()
    assert len(calls) == 3 * len(recorder.sites)


@pytest.mark.parametrize("name", [name for name in SMALL if name not in SHARED])
def test_drop_path_and_layer_scale_reach_the_blocks(name):
    model = build(name, drop_path=0.3, layer_scale=0.5)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    first = 0.3 if ROWS[name]["family"] in CONSTANT else 0
    assert rates == sorted(rates) and rates[0] == first and rates[-1] == pytest.approx(0.3)
    gammas = [p for n, p in model.named_parameters() if n.endswith("gamma") and not n.startswith("pooling.")]
    assert gammas and all((gamma == 0.5).all() for gamma in gammas)


@pytest.mark.parametrize("name", SMALL)
def test_layer_decay(name):
    """timm's layer decay: the stem learns slowest, the head at the full rate, later blocks faster than earlier ones."""
    model = build(name)
    groups = param_groups_layer_decay(
        model, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
    )
    names = {id(p): n for n, p in model.named_parameters()}
    rate = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert set(rate) == set(names.values())
    assert {r for n, r in rate.items() if n.startswith("head")} == {1.0}
    assert {r for n, r in rate.items() if n.startswith("stem")} == {min(rate.values())}
    of_blocks = [rate[f"{n}.{next(iter(dict(m.named_parameters())))}"] for n, m in blocks(model)]
    assert of_blocks == sorted(set(of_blocks)) and max(of_blocks) == 0.5
    assert {r for n, r in rate.items() if n.startswith("norm")} <= {0.5}
    assert all(decay[n] == 0 for n in model.no_weight_decay())


def blocks(model: Backbone) -> list[tuple[str, nn.Module]]:
    """Those of the stages, and of class attention behind them."""
    stages = [(f"stages.{s}", stage) for s, stage in enumerate(model.stages)]
    stages += [("class_stage", model.class_stage)] if getattr(model, "class_stage", None) is not None else []
    return [(f"{name}.blocks.{b}", block) for name, stage in stages for b, block in enumerate(stage.blocks)]


@pytest.mark.parametrize("name", SMALL)
def test_coarse_groups_are_the_stages(name):
    model = build(name)
    matcher = model.group_matcher(coarse=True)
    assert set(matcher) == {"stem", "blocks"}
    assert len(group_parameters(model, matcher)) == 1 + len(model.stages) + 1


@pytest.mark.parametrize(("name", "expected"), [("vit_tiny", "stem.class_token"), ("vit_tiny", "stem.position.table")])
def test_tables_and_tokens_do_not_decay(name, expected):
    with torch.device("meta"):
        assert expected in create_model(name).no_weight_decay()


def test_relative_position_tables_do_not_decay():
    model = build("swin_32px")
    assert sum(n.endswith("bias.table") for n in model.no_weight_decay()) == sum(len(s.blocks) for s in model.stages)
    assert model.no_weight_decay() <= {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("name", SMALL)
def test_no_head_gives_the_pooled_features(name):
    cfg = compose_model(name)
    model = instantiate(cfg.model, num_classes=0).eval()
    assert model(images(2, 3, 32, 32)).shape == (2, model.channels[-1])
    tokens = model.forward_features(images(2, 3, 32, 32))
    assert tokens.ndim == 3 and tokens.shape[-1] == model.channels[-1]


@pytest.mark.parametrize("name", SMALL)
def test_other_numbers_of_input_channels(name):
    assert build(name, in_channels=1).eval()(images(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", SMALL)
def test_weights_survive_a_round_trip(name):
    model, x = build(name).eval(), images(1, 3, 32, 32)
    other = instantiate(compose_model(name).model, num_classes=7).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("name", SMALL)
def test_autocast(name):
    model, x = build(name).eval(), images(2, 3, 32, 32)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
    assert logits.isfinite().all()
    assert (logits.float() - expected).norm() < 0.1 * expected.norm()  # bfloat16 keeps 8 bits, about 0.4 %, per step


@pytest.mark.parametrize("name", SMALL)
def test_bad_sizes_are_refused(name):
    with pytest.raises(ValueError, match=r"num_classes: must be 0 \(no head\) or more, got -1; set model.num_classes"):
        create_model(name, num_classes=-1)
    with pytest.raises(ValueError, match=r"image_size: must be pixels, one positive number or two, got 0"):
        create_model(name, image_size=0)
