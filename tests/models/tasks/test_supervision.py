"""Deep supervision: the loss by its formula, its weight, what is refused, and training with a second classifier."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import create_model
from models.checkpoints import load_weights
from models.tasks.classification import Classification
from models.tasks.multilabel import MultiLabel
from models.tasks.supervision import is_supervised, with_overview
from tests.models.tasks.test_token_labelling import OPTIMIZER, SCHEDULE, Net, fit, images, state
from tests.models.tasks.test_token_labelling import labelled as labelled

SMALL = {"dims": [8, 16], "depths": [1, 1], "kernels": [5, 5], "focus_depths": [1, 1], "num_heads": [1, 2]}
SMALL |= {"head_width": 8, "num_classes": 3, "image_size": 16, "auxiliary": True}


def made(**settings) -> nn.Module:
    torch.manual_seed(0)
    return create_model("overlock_32px", **SMALL | settings).train()


def task(model: nn.Module | None = None, **settings) -> Classification:
    return Classification(model or made(), OPTIMIZER, SCHEDULE, 3, **settings)


@pytest.mark.parametrize("weight", [0.4, 0.7])
@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_the_second_classifier_adds_its_share_of_the_same_loss(loss, weight, monkeypatch):
    auxiliary = {} if weight == 0.4 else {"overview": {"weight": weight, "reduction": "mean"}}
    module, logged = task(label_smoothing=0.1, loss=loss, auxiliary=auxiliary), {}
    monkeypatch.setattr(module, "log", lambda name, value, **kwargs: logged.update({name: value}))
    pixels, labels = torch.randn(4, 3, 16, 16), torch.rand(4, 3).softmax(1)
    module.model.eval()
    logits, _, of_overview = with_overview(module.model, pixels)
    targets = 0.9 * labels + 0.1 / 3
    formula = F.cross_entropy if loss == "ce" else F.binary_cross_entropy_with_logits
    expected = formula(logits, targets) + weight * formula(of_overview, targets)
    batch = type("Batch", (), {"images": pixels, "labels": labels})
    found = module.training_step(batch, 0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(logged["train/overview"], formula(of_overview, targets))
    found.backward()
    assert module.model.aux_head.weight.grad.abs().sum() > 0


def test_only_a_model_with_one_is_supervised():
    assert is_supervised(made())
    others = Net(), made(auxiliary=False), made(deploy=True), made(num_classes=0), create_model("vit_32px")
    assert not any(map(is_supervised, others))


def test_in_evaluation_nothing_reads_it():
    model, pixels = made().eval(), torch.randn(2, 3, 16, 16)
    expected = model(pixels)
    nn.init.constant_(model.aux_head.weight, torch.nan)
    assert torch.equal(model(pixels), expected)


def test_where_it_would_learn_nothing_it_is_refused():
    text = "trains one classifier, got OverLoCK with another one of its overview; set model.auxiliary=false"
    with pytest.raises(ValueError, match=f"task: token labelling {text}"):
        task(token_weight=0.5)
    with pytest.raises(ValueError, match=f"task: multilabel {text}"):
        MultiLabel(made(), OPTIMIZER, SCHEDULE, 3)
    wrapped = made()
    wrapped.wrapper = nn.Identity()
    with pytest.raises(ValueError, match=f"task: a wrapper {text}"):
        task(wrapped)
    assert task(made(auxiliary=False), token_weight=0.5).token_head.in_features == 8


def test_a_resumed_run_is_the_same(labelled, tmp_path):
    def run(name, **settings):
        data = images((labelled[0], None), augment={"cutmix": 1.0, "hflip": 0.5})
        return state(module := task(), fit(module, data, tmp_path / name, max_epochs=2, **settings))

    expected = run("whole")
    found = run("again", resume=tmp_path / "whole" / "checkpoints" / "step-00000001")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert "aux_head.weight" in load_weights(tmp_path / "again" / "checkpoints" / "last")


def test_both_classifiers_are_one_graph_when_compiled():
    model, pixels = made(), torch.randn(2, 3, 16, 16)
    plain = with_overview(model, pixels)
    compiled = torch.compile(with_overview, backend="eager", fullgraph=True)(model, pixels)
    torch.testing.assert_close(compiled[0], plain[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled[2], plain[2], rtol=1e-5, atol=1e-5)
