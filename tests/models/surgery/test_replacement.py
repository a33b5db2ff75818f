"""Our mechanisms inside models of timm: the true map, the weights that fit, and nothing changed by an error."""

import copy
import pickle
from functools import partial

import pytest
import timm
import torch
from torch import nn

from models import create_model
from models.attention import Grid, Mixed, Mixer, replace, to_moh
from models.attention.agent import agent_attention
from models.attention.conv import conv
from models.attention.dual import dual_attention
from models.attention.inline import inline_attention
from models.attention.moh import MoHAttention
from models.attention.softmax import softmax_attention

window_attention = partial(softmax_attention, window=4, shift=True, relative_position_bias=True)


def vit(name="vit_tiny_patch16_224", **options):
    small = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return random(timm.create_model(name, **{**small, **options}))


def swin(**options):
    small = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "num_classes": 5}
    return random(timm.create_model("swin_tiny_patch4_window7_224", **{**small, **options}))


def random(model):
    """Weights, biases and tables that all show in the output."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.double().eval()


def images(height=32, width=48):
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(height))


class Noted(Mixer):
    """A mixer that changes nothing and keeps the maps it was given."""

    def __init__(self, site):
        super().__init__(site)
        self.weight, self.grids = nn.Parameter(torch.ones(site.dim)), []

    def forward(self, x_BNC, grid, gates_BNM=None):
        if not x_BNC.is_meta:  # `replace` tries on the meta device what a training step would return
            self.grids.append(grid)
        return Mixed(x_BNC * self.weight, {})


class Carrying(Noted):
    carries = True


VITS = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "norms": {"qk_norm": True},
}


@pytest.mark.parametrize("options", VITS.values(), ids=VITS)
def test_softmax_leaves_a_vit_as_it_is(options):
    model = vit(**options)
    before = model(images())
    # the options of a file are no wishes of the user: that the model has no biases goes before them
    report = replace(model, "softmax" if "qkv_bias" in options else softmax_attention)
    torch.testing.assert_close(model(images()), before, rtol=0, atol=1e-10)
    assert report.unchanged and not report.dropped and not any(module.training for module in model.modules())
    assert sum(report.new.values()) == (64 if "proj_bias" in options else 0)


@pytest.mark.parametrize("options", [{}, {"img_size": (32, 64)}, {"head_dim": 4, "qkv_bias": False}], ids=str)
def test_windows_leave_a_swin_as_it_is(options):
    model = swin(**options)
    x = images(*model.patch_embed.img_size)
    before = model(x)
    report = replace(model, window_attention)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-10)
    assert report.unchanged and not report.new and not report.dropped


def test_another_output_is_said_to_be_another():
    """timm rolls the map before it pads it to whole windows: with equal weights, padded shifted windows differ."""
    report = replace(swin(img_size=40), window_attention)
    assert not report.new and not report.dropped and not report.unchanged
    assert str(report).splitlines()[-1] == "  the model computes something else: train it before use"
    without_biases = partial(softmax_attention, qkv_bias=False)
    model = vit()
    assert not replace(copy.deepcopy(model), without_biases).unchanged
    for block in model.blocks:
        nn.init.zeros_(block.attn.qkv.bias)
    report = replace(model, without_biases)
    assert report.unchanged and report.dropped.keys() == {"qkv.bias"}


def test_the_report_says_what_happened():
    report = replace(swin(), "agent", where=lambda site: site.stage == 1, agent_tokens=4)
    assert str(report).splitlines() == [
        "agent in 2 of 4 places: layers.1.blocks.0.attn to layers.1.blocks.1.attn",
        "  reused   8,448 parameters: qkv, proj",
        "  new      4,288 parameters: core.gather_bias, core.scatter_bias, core.dwc",
        "  dropped  392 parameters: relative_position_bias_table",
        "  the model computes something else: train it before use",
    ]


def test_parameters_are_kept_where_their_role_is_the_same():
    model, projections = swin(), {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    for _ in range(2):  # in the second round from one of ours, which wraps what it kept
        assert replace(model, dual_attention).reused.keys() >= projections
    assert replace(model, conv).reused == {}, "its proj is no projection"
    assert replace(model, window_attention).new.keys() == projections | {"core.bias.table"}


def test_a_vit_gives_its_mixers_the_true_map():
    model = vit(dynamic_img_size=True, dynamic_img_pad=True)
    replace(model, Noted)
    for size in [(32, 48), (48, 32), (20, 41)]:
        model(images(*size))
    assert model.blocks[1].attn.grids == [Grid(4, 6, 1), Grid(6, 4, 1), Grid(3, 6, 1)]
    for options in ({"img_size": 64, "dynamic_img_size": True}, {"img_size": (63, 96)}):
        model = vit("vit_tiny_r_s16_p8_224", depth=1, **options)
        replace(model, Noted)
        model(images(63, 96))  # its convolutions round up, where timm's `dynamic_feat_size` rounds down
        assert model.blocks[0].attn.grids == [Grid(2, 3, 1)]
    model = vit()
    replace(model, Noted)
    model.set_input_size((16, 72))
    model(images(16, 72))
    assert model.blocks[0].attn.grids == [Grid(2, 9, 1)]
    replace(model, agent_attention)
    assert model.blocks[0].attn.site.grid == Grid(2, 9, 1)


def test_a_swin_gives_its_mixers_the_true_map():
    model = swin(strict_img_size=False)
    replace(model, [window_attention, Noted])
    model(images(36, 52))
    model.set_input_size((64, 40))
    model(images(64, 40))
    assert model.layers[1].blocks[0].attn.grids == [Grid(5, 7), Grid(8, 5)]
    replace(model, agent_attention)
    assert model.layers[1].blocks[0].attn.site.grid == Grid(8, 5)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_has_its_own_maps(again):
    model = vit(dynamic_img_size=True)
    replace(model, agent_attention)
    other = again(model)
    other.patch_embed(images(48, 32))
    torch.testing.assert_close(other(images(48, 32)), model(images(48, 32)))
    other.patch_embed(images(64, 24))
    x = model._pos_embed(model.patch_embed(images()))
    assert torch.equal(model.forward_head(model.norm(model.blocks(x))), model(images()))


def test_weights_are_saved_and_loaded_under_the_names_of_timm():
    model, other = vit(), vit()
    names = set(model.state_dict())
    replace(model, agent_attention)
    replace(other, agent_attention)
    assert names <= set(model.state_dict())
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(images()), model(images()), rtol=0, atol=0)


@pytest.mark.parametrize("make", [vit, swin])
def test_what_is_kept_is_the_same_parameter(make):
    """Optimizers go on, and frozen ones stay frozen; what is new is trained, in the model's dtype and mode."""
    model = make().bfloat16().requires_grad_(False).train()
    old, order = dict(model.named_parameters()), [n for n, _ in model.named_parameters()]
    replace(model, agent_attention)
    kept = {name: p for name, p in model.named_parameters() if name in old}
    assert len(kept) >= len(old) - 4 and all(p is old[name] for name, p in kept.items())
    assert list(kept) == [name for name in order if name in kept]
    new = {name: p for name, p in model.named_parameters() if name not in old}
    assert new and all(p.requires_grad and p.dtype == torch.bfloat16 for p in new.values())
    assert all(module.training for module in model.modules())


def test_a_mechanism_may_be_replaced_again():
    model = vit()
    before = model(images())
    replace(model, agent_attention)
    assert not torch.allclose(model(images()), before)
    report = replace(model, agent_attention)
    assert report.unchanged and not report.new
    report = replace(model, softmax_attention)
    assert report.dropped and not report.new and not report.unchanged
    torch.testing.assert_close(model(images()), before, rtol=0, atol=1e-10)
    assert len(model.patch_embed._forward_hooks) == 1


@pytest.mark.parametrize(
    ("make", "any_size"), [(vit, {"dynamic_img_size": True}), (swin, {"strict_img_size": False})], ids=["vit", "swin"]
)
def test_gradients_are_the_same_with_checkpointing(make, any_size):
    """Two sizes are on their way at once: a block that runs again must find the map of its own pass."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = make(**any_size)
        replace(model, agent_attention)
        random(model).train().set_grad_checkpointing(checkpointing)
        for block in [module for module in model.modules() if hasattr(module, "drop_prob")]:
            block.drop_prob = 0.0
        (model(images(32, 32)).sum() + model(images(40, 48)).square().sum()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(g is not None for g in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_compiled_model_gives_the_same():
    model = vit(depth=1)
    replace(model, agent_attention)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), model(images()))


class Blockless(nn.Module):
    """A block without an attention of its own."""

    def __init__(self, **_):
        super().__init__()


def gated():
    model = vit()
    for block in model.blocks:
        block.attn = timm.layers.Attention(32, num_heads=2, gated=True)
    return model


streaming = partial(inline_attention, residual_input="stream")
moh = partial(MoHAttention, core=softmax_attention, shared_heads=0, routed_heads=1)
dropping = partial(vit, attn_drop_rate=0.1, proj_drop_rate=0.1, patch_drop_rate=0.1, scale_attn_norm=True)
beyond = {"where": lambda site: site.stage > 2}
REPLACE = [
    (
        vit,
        "agnt",
        {},
        r"there is no attention 'agnt'; did you mean 'agent'.*\?\navailable: additive, agent, aggregated, ",
    ),
    (vit, "agent", {"agents": 9}, r"agent has no option 'agents'; did you mean .* options: agent_tokens, b"),
    (vit, conv, {"backend": "torch"}, "options must go with a name, got backend with a factory; use functools.partial"),
    (
        vit,
        3,
        {},
        "attention must be a name, a factory or a list with one for each of 1 stages, got 3; `python train.py list a",
    ),
    (
        swin,
        [conv],
        {},
        "attention must be .* with one for each of 2 stages, got .*function conv .*; `python train.py list a",
    ),
    (vit, conv, {"where": [0, 1]}, r"where must be a function of a .*\.Site, got \[0, 1\]; e.g. where=lambda site: "),
    (swin, conv, beyond, "where must choose a place, got none; the model has stage 0 with blocks 0 to 1, stage 1 "),
    (partial(timm.create_model, "resnet10t"), conv, {}, "the model must be a .* of timm, got ResNet; give such a"),
    (partial(vit, block_fn=Blockless), conv, {}, "every block must have one attention, got a Blockless as blocks.0; c"),
]
MISFITS = [
    (vit, conv, "it works on the map alone and cannot take the 1 class or register .*; create the model with class_t"),
    (vit, moh, "it gives the loss load_balance in training, which a timm model does not hand on; use models.create_m"),
    (vit, Carrying, "it hands tensors on from block to block, which those of timm do not; use models.create_model"),
    (vit, streaming, "it also reads the tokens before their norm, which .*; use models.create_model, or residual_in"),
    (partial(swin, head_dim=4), agent_attention, "its heads have 4 channels, here they would have 8; choose a mech"),
    (partial(vit, qk_norm=True), agent_attention, r"the model normalises .* \(qk_norm\), which it cannot keep; use s"),
    (partial(vit, attn_layer="diff"), conv, "its attention is a DiffAttention, not the plain one of timm; choose an"),
    (dropping, conv, "the model has attn_drop_rate and proj_drop_rate and patch_drop_rate and scale_attn_norm, which "),
    (gated, conv, "the model has gated, which is not kept; create it without"),
]
CASES = [(make, attention, options, f"^replace: {text}") for make, attention, options, text in REPLACE] + [
    (make, attention, {}, rf"^attention: . of . places cannot .*:\n  stage 0 blocks 0-1 \(.*\): {text}")
    for make, attention, text in MISFITS
]


@torch.no_grad()
def test_a_pretrained_vit_gets_head_gates_without_parameters():
    model = vit(num_heads=4)
    before, gates = model(images()), {"router": "l2", "balance": "bias", "shared_heads": 1}
    assert replace(model, "moh", routed_heads=3, **gates).unchanged
    torch.testing.assert_close(model(images()), before)
    report = replace(model, "moh", routed_heads=1, **gates)
    assert not report.unchanged and not report.new and not report.dropped


@pytest.mark.parametrize(("make", "attention", "options", "text"), CASES, ids=range(len(CASES)))
def test_an_error_comes_before_any_change(make, attention, options, text):
    model = make()
    modules, hooks = dict(model.named_modules()), [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(ValueError, match=text):
        replace(model, attention, **options)
    assert dict(model.named_modules()) == modules
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_what_a_mixer_cannot_know_is_refused():
    model = vit()
    replace(model, agent_attention)
    with pytest.raises(ValueError, match=r"MultiHead must know the map, got 25 tokens of none; call the whole model"):
        model.blocks(torch.zeros(1, 25, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"MultiHead has no masks, got attn_mask or is_causal; call the model without"):
        model(images(), is_causal=True)


def test_parts_go_into_models_of_timm():
    model = vit(class_token=False, global_pool="avg")
    report = replace(model, "softmax", layout="grid", bias="relative")
    mixer = model.get_submodule(report.places[0])
    assert min(mixer.window) > 1
    assert any("core.bias.table" in name for name in report.new) and not report.unchanged
    model(images()).sum().backward()
    assert mixer.core.bias.table.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"takes no layout; leave out attention/layout"):
        replace(vit(class_token=False, global_pool="avg"), "biformer", layout="grid")


def test_head_gates_go_around_parts():
    model = create_model("vit_32px", layout="grid", bias="relative", dim=32, depth=1, num_heads=4, num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    to_moh(model, shared=2, routed=2)
    torch.testing.assert_close(model(x), before)
