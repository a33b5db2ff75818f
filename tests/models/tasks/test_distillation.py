"""Distillation: the losses by their formulas, what is refused, and training, saving and resuming with a teacher."""

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from models import create_model
from models.checkpoints import load_weights
from models.tasks.classification import Classification
from models.tasks.distillation import Distillation, with_both_heads
from models.tasks.teacher import Teacher, read_teacher
from tests.models.tasks.test_token_labelling import OPTIMIZER, SCHEDULE, Net, fit, images, state
from tests.models.tasks.test_token_labelling import labelled as labelled

TEACHER = "timm/test_resnet"
SMALL = {"dims": [8, 16], "depths": [1, 1], "num_heads": [1, 2], "num_classes": 3, "image_size": 16}


@pytest.fixture
def file(tmp_path):
    """Weights of a teacher of three classes."""
    torch.manual_seed(3)
    path = tmp_path / "teacher.safetensors"
    save_file(create_model(TEACHER, num_classes=3).state_dict(), path)
    return str(path)


def task(file, kind="hard", model=None, **settings):
    given = {"distillation": kind, "teacher": TEACHER, "teacher_weights": file} | settings
    return Classification(model or Net(), OPTIMIZER, SCHEDULE, 3, **given)


def place(**changes):
    """What a teacher asks of the data."""
    given = {"image_size": 16, "channels": 3, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    return SimpleNamespace(**given | changes)


def taught(module, said):
    """With a teacher that says the same of all images."""
    module.distillation.teacher = lambda images: said
    module.log = lambda *args, **kwargs: None
    return module


@pytest.mark.parametrize("two", [False, True], ids=["one head", "two heads"])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_loss_is_that_of_the_paper(kind, two):
    torch.manual_seed(0)
    model = create_model("swiftformer_32px", **SMALL).train() if two else Net()
    pixels, labels, said = torch.randn(4, 3, 16, 16), torch.rand(4, 3).softmax(1), torch.randn(4, 3)
    module = taught(task("t", kind, model, distillation_weight=0.3, temperature=2.0, label_smoothing=0.1), said)
    assert module.two_heads == two
    if two:
        features = model.pooled(*model.forward_tokens(pixels)[:2]).x
        own, other = features @ model.head.weight.T + model.head.bias, model.distill_head(features)
        assert not torch.allclose(own, other)
    else:
        own = other = model(pixels)
    of_labels = -((0.9 * labels + 0.1 / 3) * own.log_softmax(1)).sum(1).mean()
    if kind == "hard":
        of_teacher = -torch.stack([other[i].log_softmax(0)[said[i].argmax()] for i in range(4)]).mean()
    else:
        p, q = (said / 2).softmax(1), (other / 2).softmax(1)
        of_teacher = 4 * (p * (p / q).log()).sum(1).mean()
    found = module.training_step(SimpleNamespace(images=pixels, labels=labels), 0)
    torch.testing.assert_close(found, 0.7 * of_labels + 0.3 * of_teacher)
    found.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_two_heads_learn_from_their_own_loss_alone():
    model = create_model("swiftformer_32px", **SMALL).train()
    logits, for_teacher, losses = with_both_heads(model, torch.randn(2, 3, 16, 16))
    assert losses == {}
    loss = Distillation("hard", "t", "t", 1.0, 1.0).with_labels(logits.sum(), for_teacher.sum())
    loss.backward()
    assert not model.head.weight.grad.any() and model.distill_head.weight.grad.any()


def test_a_teacher_that_agrees_costs_nothing():
    distillation, logits = Distillation("soft", "t", "t", 0.5, 3.0), torch.randn(5, 4)
    distillation.teacher = lambda images: logits
    assert distillation.loss(logits, None).abs() < 1e-6


def test_the_teacher_is_the_files_in_evaluation_without_gradients(file):
    before = torch.get_rng_state()
    teacher = read_teacher(TEACHER, file, place(), 3)
    assert torch.equal(torch.get_rng_state(), before)
    pixels = torch.randn(2, 3, 16, 16, requires_grad=True)
    expected = create_model(TEACHER, num_classes=3)
    expected.load_state_dict(load_weights(file))
    said = teacher(pixels)
    torch.testing.assert_close(said, expected.eval()(pixels), rtol=0, atol=0)
    assert not said.requires_grad and not any(p.requires_grad for p in teacher.model.parameters())
    assert teacher(pixels.bfloat16()).dtype == torch.float32
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}


def test_images_are_normalised_anew_for_a_teacher_that_knows_others(file, monkeypatch):
    monkeypatch.setattr("models.tasks.teacher.normalisation", lambda path: ([0.5] * 3, [0.25] * 3))
    data, raw = place(), torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    teacher = read_teacher(TEACHER, file, data, 3)
    plain = Teacher(teacher.model)
    torch.testing.assert_close(teacher((raw - mean) / std), plain((raw - 0.5) / 0.25), rtol=1e-4, atol=1e-5)
    assert read_teacher(TEACHER, file, place(mean=[0.5] * 3, std=[0.25] * 3), 3).scale is None


def test_a_teacher_of_ours_goes_by_name_and_file(tmp_path):
    model = create_model("swiftformer_32px", num_classes=3, image_size=32).eval()
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    teacher = read_teacher("swiftformer_32px", tmp_path / "ours.safetensors", place(image_size=32), 3)
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(teacher(pixels), model(pixels))


WRONG = {
    "kind": ({"kind": "warm"}, r"task: distillation must be hard or soft, or null, got 'warm'; set task.distillation"),
    "teacher": ({"teacher": None}, r"task: distillation=hard needs a teacher, got task\.teacher=null; give the name"),
    "file": ({"file": None}, r"task: a teacher needs its trained weights, got .*teacher_weights=null; give the file"),
    "weight": ({"distillation_weight": 1.5}, r"task: distillation_weight must be a number in \[0, 1\], got 1.5; set t"),
    "temperature": ({"temperature": 0}, r"task: temperature must be a positive number, got 0; set task.temperature"),
    "without": (
        {"kind": None},
        r"task: a teacher is for distillation, got task\.teacher=timm/test_resnet .*; set task",
    ),
    "tokens": (
        {"token_weight": 0.5},
        r"task: a model learns from token labels or from a teacher, got token_weight=0\.5",
    ),
}


@pytest.mark.parametrize(("change", "text"), WRONG.values(), ids=WRONG)
def test_what_does_not_go_together_is_refused(change, text):
    with pytest.raises(ValueError, match=text):
        task(**{"file": "t", **change})


def test_two_heads_of_timm_are_refused():
    model = create_model("timm/deit_tiny_distilled_patch16_224", num_classes=3, options={"depth": 1})
    with pytest.raises(
        ValueError, match=r"task: the two heads of VisionTransformerDistilled of timm are only given as"
    ):
        task("t", model=model)


def test_no_distillation_is_what_it_was():
    for kind in (None, "none"):
        module = Classification(Net(), OPTIMIZER, SCHEDULE, 3, distillation=kind)
        assert module.distillation is None and not module.two_heads


MISFITS = {
    "no such model": (
        "timm/resnet51",
        {},
        r"task: the teacher timm/resnet51 cannot teach here: timm: there is no model",
    ),
    "no such file": (TEACHER, {"file": "/nowhere.safetensors"}, r"task: the teacher .* cannot teach here: .*nowhere"),
    "classes": (TEACHER, {"classes": 5}, r"cannot teach here: timm: the file must have 5 classes, got 3; fine-tune"),
    "size": ("timm/test_vit", {"size": 8}, r"takes images of another size, got image_size=8 .*; set image_size"),
    "weights": ("timm/test_efficientnet", {}, r"cannot teach here: timm: the file must have 3 classes, got no"),
    "generates": ("dit_32px", {"size": 32}, r"generates images|cannot teach here"),
}


@pytest.mark.parametrize(("name", "change", "text"), MISFITS.values(), ids=MISFITS)
def test_a_teacher_that_does_not_fit_is_refused(file, name, change, text):
    with pytest.raises(ValueError, match=text):
        read_teacher(name, change.get("file", file), place(image_size=change.get("size", 16)), change.get("classes", 3))


def test_tables_of_another_size_are_refused(tmp_path):
    saved = create_model("timm/test_vit", num_classes=3, image_size=64)
    save_file(saved.state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(
        ValueError, match=r"cannot teach here: the weights are for images of another size, got image_size=32"
    ):
        read_teacher("timm/test_vit", tmp_path / "vit.safetensors", place(image_size=32), 3)


def test_a_wrong_teacher_stops_before_the_first_batch(labelled):
    module, seen = task("/nowhere.safetensors"), []
    module.training_step = lambda *args: seen.append(args)
    with pytest.raises(ValueError, match=r"task: the teacher timm/test_resnet cannot teach here: .*nowhere"):
        fit(module, images((labelled[0], None)), max_epochs=1)
    assert not seen


def test_a_student_learns_what_its_teacher_says(labelled, file):
    """With all weight on the teacher the student comes to agree with it; nobody teaches the teacher."""
    torch.manual_seed(0)
    losses = []

    class Looker(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            losses.append(trainer.callback_metrics["train/distillation_loss"].item())

    module = task(file, distillation_weight=1.0)
    trainer = fit(module, images((labelled[0], None)), callbacks=[Looker()], max_epochs=15)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.model.parameters()} == {id(p) for p in module.parameters()}
    teacher = module.distillation.teacher.model
    assert all(torch.equal(value, load_weights(file)[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_resumed_run_is_the_same_and_its_checkpoints_have_no_teacher(kind, labelled, file, tmp_path):
    def run(name, **settings):
        module = task(file, kind, create_model("swiftformer_32px", **SMALL).train())
        data = images((labelled[0], None), augment={"cutmix": 1.0, "scale": (0.3, 1.0), "hflip": 0.5})
        return state(module, fit(module, data, tmp_path / name, max_epochs=2, **settings))

    torch.manual_seed(4)
    expected = run("whole")
    step = tmp_path / "whole" / "checkpoints" / "step-00000001"
    torch.manual_seed(9)
    found = run("again", resume=step)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    names = create_model("swiftformer_32px", **SMALL).state_dict().keys()
    for ema in (False, True):
        assert load_weights(tmp_path / "again" / "checkpoints" / "last", ema=ema).keys() == names
    size = sum(path.stat().st_size for path in step.rglob("*.safetensors"))
    teacher = sum(value.numel() * value.element_size() for value in load_weights(file).values())
    assert size < teacher


def test_both_heads_are_one_graph_when_compiled():
    model = create_model("swiftformer_32px", **SMALL).train()
    pixels = torch.randn(2, 3, 16, 16)
    plain = with_both_heads(model, pixels)[:2]
    compiled = torch.compile(with_both_heads, backend="eager", fullgraph=True)(model, pixels)[:2]
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)
    assert isinstance(model.distill_head, nn.Linear) and F.mse_loss(*plain) > 0
