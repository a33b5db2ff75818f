"""Transforms of queries, keys and values: timm's rotations, the recorded cases of selective attention, properties."""

import re

import parity
import pytest
import reference
import torch
from timm.layers import RotaryEmbeddingCat, apply_rot_embed_cat
from torch.utils.checkpoint import checkpoint

from models.attention import Grid, Refused, Site
from models.attention.biases.kerple import kerple
from models.attention.contract.layout import Layout
from models.attention.layouts.grid import grid as dilated
from models.attention.layouts.neighborhood import neighborhood
from models.attention.layouts.window import window
from models.attention.softmax import softmax_attention
from models.attention.transforms.primer import primer
from models.attention.transforms.qk_norm import qk_norm
from models.attention.transforms.random_keys import random_keys
from models.attention.transforms.rope import rope
from models.attention.transforms.selective import selective
from models.attention.values.lepe import lepe
from models.callbacks.routing import Routing

SITE = Site(dim=16, num_heads=2, grid=Grid(4, 5), stage=0, block=0, depth=2, kind="vit")
PREFIXED = SITE.grid._replace(prefix=2)


def heads(tokens=20, dim=8):
    return [torch.randn(2, 2, tokens, dim) for _ in range(3)]


class Causal(Layout):
    """Tokens see those before them."""

    masks = True

    def mask(self, grid, device):
        return torch.ones(1, grid.tokens, grid.tokens, dtype=torch.bool, device=device).tril()


@pytest.mark.parametrize("name", [name for name in reference.cases("module") if name.startswith("selective/")])
def test_selective(name):
    """The public code: temperatures by place, in a row of tokens."""
    case = reference.info(name)
    hparams, tokens = case["hparams"], case["input_shape"][1]
    site = Site(hparams["n_embd"], hparams["n_head"], Grid(1, tokens), 0, 0, 1, "vit")
    parts = {
        "transform": lambda site: selective(site, token=False, position=True),
        "layout": lambda site: Causal() if hparams["is_causal"] else Layout(),
    }
    module = softmax_attention(site, qkv_bias=hparams["bias"], **parts)

    def state(theirs):
        names = {"c_attn": "qkv", "c_proj": "proj"}
        ours = {"transform.beta": theirs["beta"], "proj.bias": torch.zeros(site.dim)}
        return ours | {
            f"{names[key.split('.')[0]]}.{key.split('.')[1]}": value for key, value in theirs.items() if "." in key
        }

    parity.check(name, module, state, lambda module, x: module(x, site.grid).x)


def test_selective_starts_near_plain_attention_and_can_sharpen_without_a_new_order():
    part = selective(SITE)
    q, k, v = heads()
    new_q, new_k, new_v = part(q, k, v, SITE.grid, SITE.grid)
    assert new_k is k
    torch.testing.assert_close((new_q, new_v), (q, v), rtol=0.2, atol=0.1)
    torch.nn.init.constant_(part.q[-1].bias, 2.0)
    sharper = part(q, k, v, SITE.grid, SITE.grid)[0]
    before, after = (t @ k.mT for t in (new_q, sharper))
    assert torch.equal(before.argsort(-1), after.argsort(-1)) and (after.std(-1) > before.std(-1)).all()


def test_rope_is_timms():
    q, k, v = heads()
    embedding = RotaryEmbeddingCat(8, in_pixels=False, feat_shape=[4, 5], temperature=100.0).get_embed()
    ours = rope(SITE)(q, k, v, SITE.grid, SITE.grid)
    torch.testing.assert_close(ours, (apply_rot_embed_cat(q, embedding), apply_rot_embed_cat(k, embedding), v))


def test_rope_makes_products_depend_on_the_offset_and_leaves_prefix_tokens():
    part = rope(SITE)
    q = torch.randn(1, 1, 1, 8).expand(1, 1, 22, 8)
    turned, keys, _ = part(q, q, q, PREFIXED, PREFIXED)
    assert torch.equal(turned[:, :, :2], q[:, :, :2])
    logits = (turned @ keys.mT)[0, 0, 2:, 2:]
    torch.testing.assert_close(logits[0, 6], logits[6, 12])
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))
    pooled = part.angles(Grid(1, 1), SITE.grid)[0]  # a key of a shortened map stands in its middle
    assert pooled[0] == 1.5 and pooled[2] == 2


def test_a_sequence_counts_prefix_tokens():
    part = rope(SITE, base=10000, axes="sequence")
    assert torch.equal(part.angles(PREFIXED, PREFIXED)[:, 0], torch.arange(22.0))


def test_class_tokens_may_be_the_last_of_a_sequence():
    q, k, v = heads(22)
    first, last = (rope(SITE, base=10000, axes="sequence", prefix=place) for place in ("first", "last"))
    order = [*range(2, 22), 0, 1]
    found = last(q, k, v, PREFIXED, PREFIXED)[0][:, :, order]
    torch.testing.assert_close(found, first(q[:, :, order], k, v, PREFIXED, PREFIXED)[0])


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_norm_makes_the_length_of_queries_irrelevant(norm):
    part = qk_norm(SITE, norm=norm, eps=0.0)
    q, k, v = heads()
    torch.testing.assert_close(part(3 * q, k / 7, v, SITE.grid, SITE.grid), part(q, k, v, SITE.grid, SITE.grid))


def test_primer_starts_as_a_blur_or_as_nothing():
    q, k, v = heads(22)
    same = primer(SITE, init="delta")(q, k, v, PREFIXED, PREFIXED)
    assert all(torch.equal(one, other) for one, other in zip(same, (q, k, v), strict=True))
    part = primer(SITE)
    assert sum(parameter.numel() for parameter in part.parameters()) == 27 * 16
    ones = torch.ones(1, 2, 22, 8)
    blurred = part(ones, ones, ones, PREFIXED, PREFIXED)[0]
    assert (blurred[:, :, :2] == 1).all()
    torch.testing.assert_close(blurred[0, 0, 2 + 6], torch.full((8,), 0.5 + 8 * 0.5 / 9))


def test_random_keys_are_a_share_in_training_and_all_in_evaluation():
    part = random_keys(SITE, keep=0.3)
    q, k, v = heads(22)
    _, kept, values = part(q, k, v, PREFIXED, PREFIXED)
    assert kept.shape[2] == values.shape[2] == 2 + 6 and torch.equal(kept[:, :, :2], k[:, :, :2])
    assert part.eval()(q, k, v, PREFIXED, PREFIXED)[1] is k
    assert random_keys(SITE, keep=1.0)(q, k, v, PREFIXED, PREFIXED)[1] is k


def test_random_keys_follow_from_seed_step_and_layer():
    """And from nothing else: not from the state of a generator, which recomputation and resuming would have to keep."""
    big = Grid(20, 20)
    part = random_keys(SITE)
    first = part.kept(big)
    torch.rand(3)
    assert torch.equal(part.kept(big), first) and len(first.unique()) == 200
    others = [random_keys(SITE, seed=1), random_keys(SITE._replace(block=1)), random_keys(SITE._replace(stage=1))]
    part.after_step()
    for other in (part, *others):
        assert 60 < torch.isin(other.kept(big), first).sum() < 140
    resumed = random_keys(SITE)
    resumed.load_state_dict(part.state_dict())
    assert torch.equal(resumed.kept(big), part.kept(big))


def test_every_key_is_seen_about_as_often():
    part, counts = random_keys(SITE, keep=0.25), torch.zeros(20)
    for _ in range(400):
        counts[part.kept(SITE.grid)] += 1
        part.after_step()
    assert counts.min() > 60 and counts.max() < 140


def test_a_run_draws_anew_after_every_step():
    part = random_keys(SITE)
    Routing().update(torch.nn.Sequential(part))
    assert part.step == 1


def test_random_keys_are_the_same_under_recomputation():
    mixer = softmax_attention(SITE, transform=random_keys)
    x = torch.randn(2, 20, 16, requires_grad=True)

    def gradient(run):
        return torch.autograd.grad(run(lambda x: mixer(x, SITE.grid).x, x).square().sum(), x)[0]

    again = gradient(lambda function, x: checkpoint(function, x, use_reentrant=False, preserve_rng_state=False))
    assert torch.equal(again, gradient(lambda function, x: function(x)))


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ({"bias": kerple}, "SoftmaxCore"),
        ({"value": lepe}, "LePE"),
        ({"layout": lambda site: window(site, size=2, shift=True)}, "Windows"),
        ({"layout": lambda site: neighborhood(site, kernel=3)}, "Neighborhood"),
    ],
)
def test_what_needs_the_place_of_every_key_refuses_random_keys(parts, what):
    with pytest.raises(Refused, match=f"RandomKeys drops keys, and {what} needs all of them on their map; leave out"):
        softmax_attention(SITE._replace(block=1), transform=random_keys, **parts)
    softmax_attention(SITE, transform=random_keys, layout=lambda site: dilated(site, size=2))


@pytest.mark.parametrize(
    ("part", "given", "text"),
    [
        (rope, {"base": 0}, "rope: base must be a number of at least 1, got 0; set attention.transform.base"),
        (rope, {"axes": "x"}, "rope: axes must be map or sequence, got 'x'; set attention.transform.axes"),
        (rope, {"prefix": "x"}, "rope: prefix must be first or last, got 'x'; set attention.transform.prefix"),
        (
            rope,
            {"prefix": "last"},
            "rope: prefix=last is a place in a sequence, got axes=map; set attention.transform.axes=sequence",
        ),
        (qk_norm, {"norm": "no"}, "qk_norm: norm must be layernorm or rmsnorm, got 'no'; set attention.transform.norm"),
        (qk_norm, {"eps": -1}, "qk_norm: eps must be a number of at least 0, got -1; set attention.transform.eps"),
        (primer, {"init": "x"}, "primer: init must be primer or delta, got 'x'; set attention.transform.init"),
        (selective, {"token": 1}, "selective: token must be true or false, got 1; set attention.transform.token"),
        (selective, {"token": False}, "selective: token and position must not both be false; set attention.transform"),
        (random_keys, {"keep": 0}, "random_keys: keep must be a share above 0, up to 1, got 0; set attention"),
        (random_keys, {"seed": -1}, "random_keys: seed must be a whole number of at least 0, got -1; set attention"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(part, given, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        part(SITE, **given)


def test_heads_that_do_not_divide_into_pairs_are_refused():
    with pytest.raises(Refused, match=r"rope: 6 channels per head do not divide into 4; change model.num_heads"):
        rope(SITE._replace(dim=12))
