"""The parents that are drawn are those to which tokens send most, with the messages that blocks hand on."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from conf.errors import UserError
from data.module import ImageData
from data.sources.digits import Digits
from models import create_model
from models.attention import Grid, mixers_of
from models.attention.recording import recorded
from models.probes.attention_map import row_of
from models.probes.dependency_tree import Tree, dependency_tree, pruned, summed, tree_of
from models.probes.drawing.overlays import arrows

VIT = {"num_classes": 10, "depth": 4, "dim": 32}


@pytest.fixture(scope="module")
def given():
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    return ImageData(Digits(), 10, 32, 8, workers=0), trainer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("vit_32px", attention="reversed", **VIT).eval()


@torch.no_grad()
def test_recorded_calls_have_what_blocks_hand_on(model):
    """With it the matrix gives what the layer gave, and messages are those of all blocks so far."""
    images, outputs = torch.randn(2, 3, 32, 32), {}
    mixers = dict(mixers_of(model))
    hooks = [m.register_forward_hook(lambda *call, n=n: outputs.update({n: call[-1]})) for n, m in mixers.items()]
    with recorded(model) as calls:
        model(images)
    for hook in hooks:
        hook.remove()
    names = list(mixers)
    assert calls[names[0]].carry is None and all(
        calls[name].carry.shape == (2, 64, 1) for name in (names[1], names[-1])
    )
    for name, mixer in mixers.items():
        x, grid = calls[name]
        weights = mixer.token_weights(x, grid, **calls[name].named).weights
        torch.testing.assert_close(mixer.attend(weights, x, grid), outputs[name].x)
        tree = tree_of(mixer, calls[name])
        torch.testing.assert_close(tree.message, outputs[name].carry.squeeze(-1))
        torch.testing.assert_close(weights.sum((1, 2)), tree.message)
    last = calls[names[-1]]
    assert (mixers[names[-1]].attention_matrix(*last) - weights).norm() > 0.1 * weights.norm(), "without it is another"
    point = (0.3, 0.6)
    torch.testing.assert_close(row_of(mixers[names[-1]], last, point).weights.flatten(2), weights[:, :, 4 * 8 + 2])


@torch.no_grad()
def test_a_parent_gets_most_of_a_token(model):
    with recorded(model) as calls:
        model(torch.randn(2, 3, 32, 32))
    name, mixer = list(mixers_of(model))[1]
    tree, sent = tree_of(mixer, calls[name]), mixer.attention_matrix(*calls[name], **calls[name].named).sum(1)
    assert tree.parent.shape == (2, 64) and tree.grid[:2] == (8, 8)
    for image, token in ((0, 0), (1, 63)):
        assert sent[image, tree.parent[image, token], token] == sent[image, :, token].max()


def test_leaves_go_first_the_least_message_before():
    """3 ← 1 ← 0 and 3 ← 2, the root is 3."""
    assert pruned([1, 3, 3, 3], [0.9, 0.1, 0.5, 0.0]) == [2, 0, 1, 3]
    assert pruned([1, 3, 3, 3], [0.4, 0.1, 0.5, 0.0]) == [0, 1, 2, 3]
    assert pruned([1, 2, 0, 0], [0.3, 0.2, 0.4, 0.9]) == [3, 1, 2, 0], "a circle of three loses its least"
    assert pruned([0, 1], [0.5, 0.5]) == [0, 1]


def test_what_is_counted():
    parent = torch.tensor([[1, 3, 3, 3], [1, 2, 0, 3]])
    found = summed(Tree(parent, torch.full((2, 4), 0.25), Grid(2, 2)))
    assert found["roots"] == 2 / 8 and found["in_circles"] == 3 / 8 and found["message"] == 0.25
    assert found["leaves"] == 3 / 8, "0 and 2 of the first, 3 of the second, on which nothing depends"
    assert found["steps"] == pytest.approx((2 + 1 + 1 + 0 + 0) / 5)


def test_arrows_point_to_parents():
    picture = Image.new("RGB", (40, 20), "white")
    plain, drawn = arrows(picture, [0, 1, 2, 3], (2, 2)), arrows(picture, [0, 1, 2, 0], (2, 2))
    changed = np.argwhere((np.asarray(plain) != np.asarray(drawn)).any(-1))
    height, width = plain.height, plain.width
    assert changed.min(0)[0] >= height // 4 - 1 and changed.min(0)[1] >= width // 4 - 1
    tip = np.asarray(drawn)[height // 4 + 2, width // 4 + 4]
    assert tuple(tip) == (0x3F, 0xA7, 0xFF), "the head lies at the parent"


def test_a_report(model, given):
    report = dependency_tree(model, *given, images=2)
    rows = report.tables["tokens"]
    assert len(rows) == 4 * 2 * 64 and len(report.pictures) == 2
    assert sorted(row["pruned"] for row in rows[:64]) == list(range(64))
    name = rows[0]["layer"]
    assert 0 <= report.figures[f"{name}/roots"] <= 1 and "of tokens are roots" in report.rows[name]


def test_a_model_without_dependencies(given):
    text = "dependency_tree: no layer has dependencies, got SoftmaxCore; choose attention=reversed"
    with pytest.raises(UserError, match=text):
        dependency_tree(create_model("vit_32px", **VIT), *given)
