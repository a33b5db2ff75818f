"""Fewer tokens: which are kept, what gradient their scores get, and who may not stand behind."""

import pytest
import torch
from timm.models import group_parameters

from models import create_model
from models.factory import compose_model
from models.layers.grid import Grid
from models.reducers.top import top

GRID, DIM = Grid(3, 4, prefix=1), 8


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def vit(at=(2,), share=0.5, **options) -> torch.nn.Module:
    node = compose_model("vit_32px", parts={"reducer": "top"}).reducer
    node.at, node.share = list(at), share
    torch.manual_seed(0)
    return create_model("vit_32px", num_classes=5, reducer=node, **options)


def test_the_largest_scores_are_kept_in_order_and_unchanged():
    reducer, x = top(DIM, GRID, 2, share=0.3), torch.randn(2, 13, DIM)
    x_new, kept, losses = reducer(x, GRID)
    score = reducer.score(x[:, 1:]).squeeze(-1)
    assert kept.shape == (2, 4) and losses == {} and (kept.diff() > 0).all()
    for image in range(2):
        assert set(kept[image].tolist()) == set(score[image].argsort(descending=True)[:4].tolist())
        assert torch.equal(x_new[image], torch.cat([x[image, :1], x[image, 1:][kept[image]]]))
    assert top(DIM, GRID, 1) is None


def test_all_tokens_are_the_tokens():
    x = torch.randn(2, 13, DIM)
    assert torch.equal(top(DIM, GRID, 2, share=1.0)(x, GRID).x, x)


def test_scores_have_the_gradient_of_a_sigmoid():
    reducer, x = top(DIM, GRID, 2), torch.randn(1, 13, DIM)
    x_new, kept, _ = reducer(x, GRID)
    x_new.sum().backward()
    tokens = x[:, 1:][:, kept[0]]
    share = torch.sigmoid(reducer.score(tokens))
    torch.testing.assert_close(reducer.score.bias.grad, (share * (1 - share) * tokens).sum()[None])


@pytest.mark.parametrize("class_token", [False, True])
def test_a_vit_with_fewer_tokens(class_token):
    model = vit(at=(1, 3), share=0.25, class_token=class_token)
    x = images(2, 3, 32, 32)
    model(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    assert model.forward_features(x).shape == (2, 4 + class_token, 96)
    first, second = model.forward_kept(x)
    assert first.shape == (2, 16) and second.shape == (2, 4)
    assert all(set(second[i].tolist()) <= set(first[i].tolist()) for i in range(2))
    torch.testing.assert_close(model(x[1:]), model(x)[1:])
    assert model(images(2, 3, 48, 64)).shape == (2, 5)


def test_what_is_left_is_pooled_and_losses_come_together():
    model = vit(pool="acmil", attention="moh", head="tversky")
    logits, losses = model(images(2, 3, 32, 32), return_losses=True, labels=torch.tensor([1, 2]))
    assert logits.shape == (2, 5) and losses.keys() == {"load_balance", "branches", "diversity"}
    assert model.eval().forward_pooled(images(2, 3, 32, 32)).weights.shape == (2, 5, 32)


def test_other_mixers_and_gates_that_need_no_map():
    assert vit(attention="xca", gate="eca")(images(1, 3, 32, 32)).shape == (1, 5)


def test_recomputation_gives_the_same_gradients():
    plain, recomputed = vit(), vit()
    recomputed.set_gradient_checkpointing(True)
    for model in (plain, recomputed):
        model(images(2, 3, 32, 32)).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_layer_decay_takes_a_reducer_with_the_block_behind_it():
    model = vit()
    groups = group_parameters(model, model.group_matcher())
    of = {name: number for number, names in groups.items() for name in names}
    assert of["reducers.2.score.weight"] == of["stages.2.blocks.0.norm1.weight"] > of["stages.1.blocks.0.norm1.weight"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"attention": "agent"},
            r"behind it tokens make up no map, which the attention needs, got it in block 0 of quart",
        ),
        (
            {"gate": "ela"},
            r"behind it tokens make up no map, which the gate needs, got it in block 0 of quarter 2; choose",
        ),
        (
            {"bias": "relative"},
            r"which the attention needs, got it in block 0 of quarter 2; choose one that takes them as",
        ),
        ({"layout": "window"}, r"which the attention needs, got it in block 0 of quarter 2"),
        ({"features_only": True}, r"features_only: maps need all tokens, got the reducer Top; leave reducer= out"),
        ({"share": 0}, r"top: share must be above 0 and at most 1, got 0; set reducer.share"),
        ({"share": "x"}, r"top: share must be above 0 and at most 1, got 'x'; set reducer.share"),
        ({"at": [0]}, r"top: at must be a list of quarters from 1 to 3, got \[0\]; set reducer.at, e.g. \[2\]"),
        ({"at": []}, r"top: at must be a list of quarters from 1 to 3, got \[\]; set reducer.at"),
    ],
)
def test_misfits_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        vit(**options)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("swin_32px", r"reducer: it stands between blocks of a plain ViT, got Swin, where its stages change the map"),
        (
            "moh_dit_s_2",
            r"reducer: it stands between blocks of a plain ViT, got DiT, where every token comes out of it",
        ),
    ],
)
def test_other_models_have_none(name, text):
    with pytest.raises(ValueError, match=text):
        create_model(name, reducer="top")


def test_a_pyramid_needs_all_tokens():
    with pytest.raises(
        ValueError, match=r"forward_pyramid: maps need all tokens, got the reducer Top; leave reducer= o"
    ):
        vit().forward_pyramid(images(1, 3, 32, 32))
