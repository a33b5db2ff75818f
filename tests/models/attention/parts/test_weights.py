"""Weights in place of the softmax: the recorded cases of their authors, and what each paper says of them."""

import math
import re

import parity
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from models.attention import Grid, Refused, Site
from models.attention.cores.normalized import normalized_attention
from models.attention.softmax import softmax_attention
from models.attention.transforms.qk_norm import qk_norm
from models.attention.weights.clipped import clipped
from models.attention.weights.normalized import normalized
from models.attention.weights.sigmoid import sigmoid
from models.attention.weights.softplus import softplus

SITE = Site(dim=16, num_heads=2, grid=Grid(4, 5), stage=0, block=0, depth=2, kind="vit")
PARTS = {"sigmoid": sigmoid, "clipped": clipped, "softplus": softplus, "normalized": normalized}


def cases(family, start):
    return [name for name in reference.cases("module") if name.startswith(f"{family}/{start}")]


def row(name, dim, heads):
    """The site of a case: a row of tokens."""
    return Site(dim, heads, Grid(1, reference.info(name)["input_shape"][1]), 0, 0, 1, "vit")


def call(module, x):
    return module(x, Grid(1, x.shape[1])).x


def sigmoid_mixer(hparams, site):
    given = {"bias": hparams.get("attn_bias", 0.0), "temperature": hparams.get("attn_temp", 0.0)}
    norm = qk_norm if hparams.get("qk_norm") else None
    return softmax_attention(
        site, weights=lambda site: sigmoid(site, **given), transform=norm, qkv_bias=hparams["bias"]
    )


def sigmoid_state(theirs, module):
    """The authors' names are ours, but for their norms; without biases they have none behind the heads."""
    ours = {key: value for key, value in theirs.items() if key.startswith(("qkv", "proj"))}
    for name in ("q", "k"):
        for kind in ("weight", "bias"):
            if f"{name}_norm.{kind}" in theirs:
                ours[f"transform.{name}.{kind}"] = theirs[f"{name}_norm.{kind}"]
    return ours if "proj.bias" in ours else ours | {"proj.bias": torch.zeros(module.proj.out_features)}


@pytest.mark.parametrize("name", cases("sigmoid", "attention__"))
def test_sigmoid(name):
    hparams = reference.info(name)["hparams"]
    module = sigmoid_mixer(hparams, row(name, hparams["dim"], hparams["num_heads"]))
    parity.check(name, module, lambda theirs: sigmoid_state(theirs, module), call)


class SigmoidBlock(nn.Module):
    """The authors' block around our mixer."""

    def __init__(self, hparams, site):
        super().__init__()
        dim, hidden = hparams["dim"], hparams["mlp"]["hidden_features"]
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.mixer = sigmoid_mixer(hparams["attn"], site)
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim)
        self.gamma1, self.gamma2 = (nn.Parameter(torch.ones(dim)) for _ in range(2))

    def forward(self, x):
        x = x + self.gamma1 * call(self.mixer, self.norm1(x))
        return x + self.gamma2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


@pytest.mark.parametrize("name", cases("sigmoid", "block__"))
def test_a_block_of_sigmoid(name):
    hparams = reference.info(name)["hparams"]
    module = SigmoidBlock(hparams, row(name, hparams["dim"], hparams["attn"]["num_heads"]))

    def state(theirs):
        attention = {key.removeprefix("attn."): value for key, value in theirs.items() if key.startswith("attn.")}
        ours = {f"mixer.{key}": value for key, value in sigmoid_state(attention, module.mixer).items()}
        ours |= {key.removeprefix("mlp."): value for key, value in theirs.items() if key.startswith(("mlp", "norm"))}
        return ours | {f"gamma{i}": theirs[f"ls{i}.gamma"] for i in (1, 2)}

    parity.check(name, module, state, lambda module, x: module(x))


@pytest.mark.parametrize("name", cases("outlier_free", "clipped__"))
def test_clipped(name):
    hparams = reference.info(name)["hparams"]
    given = {"alpha": hparams.get("alpha", 0.0), "length": hparams.get("max_seq_length")}
    if "attn_softmax" in hparams:
        gamma, zeta = map(float, hparams["attn_softmax"][len("clipped(") : -1].split(":"))
        given = {"gamma": gamma, "zeta": zeta, "from_scratch": False}
    site = row(name, hparams["hidden_size"], hparams["num_attention_heads"])
    module = softmax_attention(site, weights=lambda site: clipped(site, **given))
    parity.check(name, module, bert_state, call)


def bert_state(theirs):
    """Apart, and without a projection."""
    dim = theirs["query.weight"].shape[0]
    parts = ("query", "key", "value")
    ours = {f"qkv.{kind}": torch.cat([theirs[f"{part}.{kind}"] for part in parts]) for kind in ("weight", "bias")}
    return ours | {"proj.weight": torch.eye(dim), "proj.bias": torch.zeros(dim)}


@pytest.mark.parametrize("name", cases("nap", "nap__"))
def test_normalized(name):
    """The released block, whose tensors are (in, out)."""
    hparams = reference.info(name)["hparams"]
    module = normalized_attention(row(name, hparams["dim"], hparams["heads"]))

    def state(theirs):
        parts = ("query", "key", "value")
        ours = {
            "qkv.weight": torch.cat([theirs[f"{part}_w"].mT for part in parts]),
            "qkv.bias": torch.cat([theirs[f"{part}_b"] for part in parts]),
            "proj.weight": theirs["mix_w"].mT,
            "proj.bias": theirs["mix_b"],
            "core.weights.gain": theirs["attention_gain"][0],
            "core.weights.bias": theirs["attention_bias"][0],
        }
        return ours | {f"core.norm.{kind}": theirs[f"hidden_norm.{kind}"] for kind in ("weight", "bias")}

    parity.check(name, module, state, call)


@pytest.mark.parametrize("name", PARTS)
def test_closed_pairs_have_no_weight_and_do_not_count(name):
    part = PARTS[name](SITE)
    logits, open = torch.randn(2, 2, 20, 20), torch.rand(2, 1, 20, 20) < 0.7
    open |= torch.eye(20, dtype=torch.bool)
    weights = part(logits, open)
    assert not weights.masked_select(~open).any() and weights.isfinite().all()
    torch.testing.assert_close(part(logits + 9 * ~open, open), weights)
    sums = weights.sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-6) == part.row_stochastic


def test_sigmoid_weights_of_a_key_do_not_depend_on_the_others():
    part = sigmoid(SITE)
    logits = torch.randn(1, 2, 3, 20)
    torch.testing.assert_close(part(logits[..., :7], None), part(logits, None)[..., :7])
    assert part(torch.zeros(1, 2, 1, 20), None).sum(-1).sub(1).abs().max() < 0.1  # σ(−ln 20) · 20 = 20 / 21
    halved = sigmoid(SITE, bias=0.0)(torch.zeros(1, 2, 1, 20), None)
    assert torch.allclose(halved.sum(-1), torch.tensor(10.0))


def test_the_bias_of_sigmoid_is_kept_counted_or_learned():
    logits = torch.zeros(1, 2, 1, 80)
    fixed, counted = (sigmoid(SITE, bias=bias)(logits, None).sum(-1).mean() for bias in ("fixed", "tokens"))
    assert fixed > 3.5 and counted < 1
    learned = sigmoid(SITE, bias="learned")
    assert torch.allclose(learned.bias, torch.tensor(-math.log(20))) and learned.bias.shape == (2, 1, 1)


def test_clipped_weights_are_exactly_0_without_gradient():
    logits = torch.tensor([[[[5.0, 0, 0, -9]]]], requires_grad=True)
    part = clipped(SITE, gamma=-0.03, zeta=1.03)
    weights = part(logits, None)
    assert weights[0, 0, 0, 3] == 0 and weights[0, 0, 0, 0] == 1
    weights[..., 3].sum().backward()
    assert not logits.grad.any()
    plain = clipped(SITE, gamma=0.0)
    torch.testing.assert_close(plain(logits, None), logits.softmax(-1))


def test_clipping_that_nothing_can_be_learned_under_is_refused():
    with pytest.raises(Refused, match=r"alpha=1 clips the undecided weights 1/20 .* set attention.weights.alpha below"):
        clipped(SITE, alpha=1)
    with pytest.raises(Refused, match=r"gamma=-0.05 clips"):
        clipped(SITE, gamma=-0.05)
    with pytest.raises(Refused, match=r"alpha=0.5 clips"):
        clipped(SITE, length=10)
    assert not clipped(SITE, alpha=1.1, from_scratch=False)(torch.zeros(1, 1, 1, 20), None).any()


def test_softplus_is_sharper_with_a_power_and_keeps_its_sharpness_per_length():
    def entropy(part, tokens):
        weights = part(torch.randn(50, 2, 4, tokens), None)
        return float(-(weights * weights.clamp_min(1e-30).log()).sum(-1).mean())

    plain, sharp = softplus(SITE, power=1), softplus(SITE)
    assert entropy(sharp, 20) < entropy(plain, 20) - 0.2
    assert abs(entropy(sharp, 80) / math.log(80) - entropy(sharp, 20) / math.log(20)) < 0.05
    logits = torch.randn(1, 2, 3, 20)
    raised = F.softplus(logits) ** 3
    torch.testing.assert_close(sharp(logits, None), raised / raised.sum(-1, keepdim=True))
    assert sharp(torch.full((1, 2, 1, 20), -200.0), None).isfinite().all()


def test_normalized_rows_have_the_mean_and_the_deviation_that_were_learned():
    part = normalized(SITE)
    nn.init.constant_(part.gain, 2.0), nn.init.constant_(part.bias, 0.25)
    weights = part(torch.randn(3, 2, 4, 20), None)
    torch.testing.assert_close(weights.mean(-1), torch.full((3, 2, 4), 0.25))
    torch.testing.assert_close(weights.std(-1, correction=0), torch.full((3, 2, 4), 2.0), rtol=2e-3, atol=0)
    pair = normalized(SITE)(torch.tensor([[[[3.0, -1.0]]] * 2]), None)
    torch.testing.assert_close(pair, torch.tensor([1.0, -1.0]).expand_as(pair), rtol=1e-3, atol=0)


def test_normalized_heads_leave_the_hull_of_their_values():
    mixer = softmax_attention(SITE, weights=normalized)
    A = mixer.attention_matrix(torch.randn(1, 20, 16), SITE.grid)
    v = torch.randn(1, 2, 20, 8)
    assert (A @ v).abs().max() > v.abs().max()


def test_a_row_without_deviation_has_a_finite_gradient():
    logits = torch.zeros(1, 2, 3, 20, requires_grad=True)
    normalized(SITE)(logits, None).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("part", "given", "text"),
    [
        (sigmoid, {"bias": "some"}, "sigmoid: bias must be one of fixed, tokens, learned, got 'some'; set"),
        (sigmoid, {"temperature": "hot"}, "sigmoid: temperature must be a number, got 'hot'; set attention.weights"),
        (clipped, {"alpha": -1}, "clipped: alpha must be a number of at least 0, got -1; set attention.weights.alpha"),
        (clipped, {"gamma": 0.1}, "clipped: gamma must be a number of at most 0, got 0.1; set attention.weights.gamma"),
        (clipped, {"zeta": 0.5}, "clipped: zeta must be a number of at least 1, got 0.5; set attention.weights.zeta"),
        (clipped, {"length": "all"}, "clipped: length must be a whole number of at least 1, tokens or null, got 'all'"),
        (clipped, {"from_scratch": 1}, "clipped: from_scratch must be true or false, got 1; set attention.weights"),
        (softplus, {"power": 0.5}, "softplus: power must be a number of at least 1, got 0.5; set attention.weights.p"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(part, given, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        part(SITE, **given)
