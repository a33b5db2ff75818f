"""Scores in place of the product of queries and keys."""

import re

import parity
import pytest
import reference
import torch

from models.attention import Grid, Refused, Site
from models.attention.cosine import cosine_attention
from models.attention.scores.cosine import cosine
from models.attention.scores.dot import dot
from models.attention.scores.neural import neural
from models.attention.softmax import softmax_attention

SITE = Site(dim=16, num_heads=2, grid=Grid(4, 5), stage=0, block=0, depth=2, kind="vit")


def cases(family):
    return [name for name in reference.cases("module") if name.startswith(f"{family}/")]


@pytest.mark.parametrize("name", cases("neural_attention"))
def test_neural(name):
    """The authors' projection has its channels in the order (D, part, head)."""
    case = reference.info(name)
    hparams, tokens = case["hparams"], case["input_shape"][1]
    heads, width = hparams["heads"], hparams["projection_dim"]
    site = Site(hparams["dim"], heads, Grid(1, tokens), 0, 0, 1, "vit")
    score = neural(site, width=width)
    module = softmax_attention(site, score=lambda site: score, qkv_bias=False)

    def state(theirs):
        packed = theirs["to_qkv.weight"].unflatten(0, (-1, 3, heads)).permute(1, 2, 0, 3).flatten(0, 2)
        ours = {"qkv.weight": packed, "proj.weight": theirs["W_out.weight"], "proj.bias": torch.zeros(hparams["dim"])}
        first = theirs["linear1.weight"]
        score = {"q_hidden.weight": first[:, :width], "k_hidden.weight": first[:, width:]}
        score["q_hidden.bias"] = theirs["linear1.bias"]
        for ours_, theirs_ in (("q", "q_proj"), ("k", "k_proj"), ("out.1", "linear2"), ("out.3", "linear3")):
            score |= {f"{ours_}.{kind}": theirs[f"{theirs_}.{kind}"] for kind in ("weight", "bias")}
        return ours | {f"core.score.{key}": value for key, value in score.items()}

    parity.check(name, module, state, lambda module, x: module(x, site.grid).x)


def test_neural_scores_of_permuted_keys_are_permuted():
    part = neural(SITE)
    q, k, order = torch.randn(2, 2, 7, 8), torch.randn(2, 2, 9, 8), torch.randperm(9)
    torch.testing.assert_close(part(q, k[:, :, order]), part(q, k)[..., order])


def test_neural_holds_one_number_per_pair_and_width():
    """The largest tensor of the forward pass is (B, M, N, S, p), not that of queries and keys joined."""
    part, sizes = neural(SITE, width=4), []
    for module in part.modules():
        module.register_forward_hook(lambda module, args, y: sizes.append(max(y.numel(), *(x.numel() for x in args))))
    part(torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8))
    assert max(sizes) == 2 * 20 * 20 * 4


def test_too_many_tokens_are_refused():
    with pytest.raises(Refused, match=r"neural: 1089 tokens see each other, more than max_tokens=1024 allows; choose"):
        neural(SITE._replace(grid=Grid(33, 33)))
    part = neural(SITE, max_tokens=20)
    with pytest.raises(Refused, match=r"neural: 21 tokens"):
        part(torch.randn(1, 2, 21, 8), torch.randn(1, 2, 21, 8))


def test_the_product_is_what_the_core_has_anyway():
    mixer = softmax_attention(SITE, score=dot)
    assert mixer.core.score is None and not mixer.core.explicit


def test_cosine_is_that_of_cosine_attention():
    ours, theirs = softmax_attention(SITE, score=cosine), cosine_attention(SITE)
    torch.nn.init.zeros_(theirs.core.bias.cpb_fc2.weight), torch.nn.init.zeros_(theirs.core.bias.cpb_fc2.bias)
    state = theirs.state_dict()
    ours.load_state_dict(
        {key.replace("core.", "core.score."): value for key, value in state.items() if "cpb" not in key}
    )
    x = torch.randn(2, 20, 16)
    torch.testing.assert_close(ours.attention_matrix(x, SITE.grid), theirs.attention_matrix(x, SITE.grid))
    torch.testing.assert_close(ours(x, SITE.grid).x, theirs(x, SITE.grid).x)


def test_the_lengths_of_queries_and_keys_do_not_matter_to_cosine():
    part = cosine(SITE)
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 6, 8)
    torch.testing.assert_close(part(3 * q, 0.2 * k), part(q, k))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"width": 0}, "neural: width must be a whole number of at least 1, got 0; set attention.score.width"),
        ({"max_tokens": "x"}, "neural: max_tokens must be a whole number of at least 1, got 'x'; set attention.score"),
    ],
)
def test_wrong_options_are_named(given, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        neural(SITE, **given)
