"""Gated attention: the recorded cases of outlier-free transformers, timm's gates per channel, and any core under it."""

import re
from functools import partial

import parity
import pytest
import reference
import timm
import torch

from models.attention import Grid, Refused, Site
from models.attention.gated import GatedAttention
from models.attention.moh import MoHAttention
from models.attention.softmax import softmax_attention

SITE = Site(dim=16, num_heads=2, grid=Grid(4, 5), stage=0, block=0, depth=2, kind="vit")
KINDS = ("weight", "bias")


@pytest.mark.parametrize("name", [name for name in reference.cases("module") if name.startswith("outlier_free/gate")])
def test_outlier_free(name):
    """The authors have a layer for each head, and no projection."""
    case = reference.info(name)
    hparams, (_, tokens, dim) = case["hparams"], case["input_shape"]
    heads = hparams["num_attention_heads"]
    kinds = {"conditional_per_token": "token", "conditional_per_head": "head", "unconditional_per_head": "constant"}
    options = {"kind": kinds[hparams["attn_gate_type"]], "shared": hparams.get("attn_gate_linear_all_features", False)}
    options["hidden"] = 4 if hparams.get("attn_gate_mlp") else None
    site = Site(dim, heads, Grid(1, tokens), 0, 0, 1, "vit")
    module = GatedAttention(site, core=softmax_attention, init=hparams.get("attn_gate_init", 0.5), **options)

    def state(theirs):
        parts = ("query", "key", "value")
        ours = {f"mixer.qkv.{k}": torch.cat([theirs[f"{part}.{k}"] for part in parts]) for k in KINDS}
        ours |= {"mixer.proj.weight": torch.eye(dim), "mixer.proj.bias": torch.zeros(dim)}
        if options["shared"]:
            return ours | {f"gate.{k}": theirs[f"alpha.{k}"] for k in KINDS}
        for layer in (0, 2) if options["hidden"] else (None,):
            end = "" if layer is None else f".{layer}"
            for k in KINDS:
                joined = torch.cat([theirs[f"alpha.{head}{end}.{k}"] for head in range(heads)])
                ours[f"gate.layers.{layer or 0}.{k}"] = joined[:, :, None] if k == "weight" else joined
        return ours

    parity.check(name, module, state, lambda module, x: module(x, site.grid).x)


@pytest.mark.parametrize("head_dim", [None, 4])
def test_elementwise_is_timms(head_dim):
    theirs = timm.layers.attention.Attention(16, 2, qkv_bias=True, gated=True, attn_head_dim=head_dim)
    ours = GatedAttention(SITE, core=partial(softmax_attention, head_dim=head_dim), kind="elementwise")
    prefixes = {"qkv": "mixer.qkv", "proj": "mixer.proj", "gate": "gate"}
    ours.load_state_dict(
        {f"{prefixes[key.split('.')[0]]}.{key.split('.')[1]}": value for key, value in theirs.state_dict().items()}
    )
    x = torch.randn(2, 20, 16)
    torch.testing.assert_close(ours(x, SITE.grid).x, theirs(x))


@pytest.mark.parametrize("kind", ["token", "head", "constant", "elementwise"])
def test_gates_start_about_as_asked(kind):
    mixer = GatedAttention(SITE, core=softmax_attention, kind=kind, init=0.9, scale=1 / 0.9)
    gates = mixer.gates(0 * torch.randn(2, 20, 16))
    torch.testing.assert_close(gates, torch.ones_like(gates))
    x = torch.randn(2, 20, 16)
    gates = mixer.gates(x)
    assert gates.shape == (2, 20, 16 if kind == "elementwise" else 2)
    assert torch.equal(gates[:, 0], gates[:, 1]) == (kind in ("head", "constant"))
    assert torch.equal(gates[0], gates[1]) == (kind == "constant")


def test_a_gate_can_silence_a_head_where_softmax_cannot():
    mixer = GatedAttention(SITE, core=softmax_attention, kind="constant")
    torch.nn.init.constant_(mixer.gate, -50.0)
    y = mixer(torch.randn(2, 20, 16), SITE.grid).x
    torch.testing.assert_close(y, mixer.mixer.proj.bias.expand_as(y))


@pytest.mark.parametrize("kind", ["token", "elementwise"])
@pytest.mark.parametrize("outer", [True, False], ids=["gated(moh)", "moh(gated)"])
def test_gates_and_mixture_of_heads_work_together(kind, outer):
    moh = partial(MoHAttention, shared_heads=1, routed_heads=1)
    gated = partial(GatedAttention, kind=kind)
    site = SITE._replace(num_heads=4)
    made = (gated if outer else moh)(site, core=partial(moh if outer else gated, core=softmax_attention))
    mixed = made(torch.randn(2, 20, 16), SITE.grid)
    (mixed.x.square().mean() + mixed.losses["load_balance"]).backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_gates_per_channel_do_not_go_to_a_kernel_that_takes_those_of_heads():
    core = softmax_attention
    assert GatedAttention(SITE, core=core).runs() == core(SITE).runs(gated=True)
    assert GatedAttention(SITE, core=core, kind="elementwise").runs() == core(SITE).runs(gated=False)


@pytest.mark.fused
@pytest.mark.parametrize("kind", ["token", "head", "constant", "elementwise"])
@pytest.mark.parametrize("options", [{}, {"window": 2, "shift": True}], ids=["whole", "windows"])
def test_kernels_give_the_same(kind, options):
    site = SITE._replace(block=1)
    fused, plain = (
        GatedAttention(site, core=partial(softmax_attention, backend=backend, **options), kind=kind)
        for backend in ("auto", "torch")
    )
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 20, 16)
    torch.testing.assert_close(fused(x, site.grid).x, plain(x, site.grid).x)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"kind": "x"}, "gated: kind must be one of token, head, constant, elementwise, got 'x'; set attention.kind"),
        ({"init": 1}, "gated: init must be a number between 0 and 1, both excluded, got 1; set attention.init"),
        ({"scale": 0}, "gated: scale must be a number above 0, got 0; set attention.scale"),
        ({"hidden": 4, "kind": "constant"}, "gated: a hidden layer is one of each head, got hidden=4; set attention"),
    ],
)
def test_wrong_options_are_named(given, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        GatedAttention(SITE, core=softmax_attention, **given)


def test_channels_that_do_not_divide_into_slices_are_refused():
    core = partial(softmax_attention, head_dim=4)
    with pytest.raises(Refused, match=r"16 channels of the input do not divide into slices for 3 heads; set attention"):
        GatedAttention(SITE._replace(num_heads=3), core=core)
    GatedAttention(SITE._replace(num_heads=3), core=core, shared=True)
