"""Matching: the terms by their formulas, what is refused, and training, saving and resuming beside an original."""

import json
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file

from models import create_model
from models.attention import mixers_of
from models.checkpoints import create_from, load_weights
from models.surgery.transplant import transplanted
from models.tasks.classification import Classification
from models.tasks.layers_apart import divergence, followed, layers_apart
from models.tasks.matching import Matching
from tests.models.tasks.test_generation import batch, model, task
from tests.models.tasks.test_token_labelling import OPTIMIZER, SCHEDULE, fit, images, state
from tests.models.tasks.test_token_labelling import labelled as labelled

SMALL = {"dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3, "image_size": 16}
PLACE = SimpleNamespace(image_size=16, channels=3)


def vit(attention="softmax", seed=5, **settings):
    torch.manual_seed(seed)
    return create_model("vit_32px", attention=attention, **(SMALL | settings)).train()


def converted(original, attention, **settings):
    """The model with another mechanism, and all weights of the original that fit."""
    made = vit(attention, **settings)
    made.load_state_dict(transplanted(original.state_dict(), made).weights)
    return made


def ready(original, student, **settings):
    matching = Matching("somewhere", **settings)
    matching._read = lambda *_: original
    matching.prepare(student, PLACE, 3)
    return matching


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "dense.safetensors"
    save_file(vit().state_dict(), path)
    return str(path)


def test_rows_are_apart_by_their_divergence():
    p, q = (torch.rand(2, 3, 4, 5).softmax(-1) for _ in range(2))
    rows = [(a * (a / b).log()).sum() for a, b in zip(p.flatten(0, 2), q.flatten(0, 2), strict=True)]
    torch.testing.assert_close(divergence(p, q), torch.stack(rows).mean())
    assert divergence(p, p) == 0


@pytest.mark.parametrize("tokens", ["original", "own"])
def test_the_terms_are_those_of_the_papers(tokens):
    """Written out with the matrices and outputs of each layer, on the original's tokens or on each model's own."""
    original, pixels = vit().eval(), torch.randn(2, 3, 16, 16)
    student = converted(original, "hedgehog", feature_dim=8)
    matching = ready(original, student, rows=1.0, outputs=0.5, prediction=0.25, tokens=tokens)
    prediction, losses, terms = matching(student, lambda net: net(pixels, return_losses=True))
    torch.testing.assert_close(prediction, student(pixels))
    x, rows, outputs = {}, [], []
    for kind, net in (("original", original), ("own", student)):
        x[kind] = net.stem(pixels)[0] if isinstance(net.stem(pixels), tuple) else net.stem(pixels)
    blocks = [[b for stage in net.stages for b in stage.blocks] for net in (original, student)]
    grid = blocks[0][0].attn.site.grid
    for old, new in zip(*blocks, strict=True):
        a, b = old.norm1(x["original"]), new.norm1(x["own"])
        b = a if tokens == "original" else b
        p, q = old.attn.attention_matrix(a, grid), new.attn.attention_matrix(b, grid)
        rows.append((p * (p / q).log()).sum(-1).mean())
        outputs.append((old.attn(a, grid).x - new.attn(b, grid).x).square().mean())
        x["original"], x["own"] = old(x["original"], grid)[0], new(x["own"], grid)[0]
    expected = {"rows": sum(rows) / 2, "outputs": sum(outputs) / 2}
    expected["prediction"] = (original(pixels) - student(pixels)).square().mean()
    assert losses == {} and terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-7)
    total = expected["rows"] + 0.5 * expected["outputs"] + 0.25 * expected["prediction"]
    torch.testing.assert_close(matching.total(terms), total, rtol=1e-4, atol=1e-7)
    matching.total(terms).backward()
    assert all(p.grad is not None for n, p in student.named_parameters() if "feature_" in n)
    assert not any(p.requires_grad or p.grad is not None for p in original.parameters())


def test_the_same_mechanism_is_not_apart():
    original, pixels = vit().eval(), torch.randn(2, 3, 16, 16)
    matching = ready(original, converted(original, "softmax"), rows=1.0, outputs=1.0, own=0.0)
    prediction, _, terms = matching(converted(original, "softmax"), lambda net: net(pixels, return_losses=True))
    assert prediction is None and terms["rows"].abs() < 1e-6 and terms["outputs"] < 1e-12


@pytest.mark.parametrize("tokens", ["original", "own"])
def test_recomputed_blocks_give_the_same_gradients(tokens):
    original, pixels, found = vit().eval(), torch.randn(2, 3, 16, 16), []
    for recompute in (False, True):
        student = converted(original, "hedgehog")
        student.set_gradient_checkpointing(recompute)
        matching = ready(original, student, rows=1.0, outputs=1.0, prediction=1.0, tokens=tokens)
        matching.total(matching(student, lambda net: net(pixels, return_losses=True)).terms).backward()
        found.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-8)


def test_a_task_adds_its_own_loss_by_its_weight():
    original, pixels = vit().eval(), torch.randn(2, 3, 16, 16)
    student, labels, found = converted(original, "hedgehog"), torch.tensor([0, 2]), {}
    for own in (0.0, 1.0):
        module = Classification(student, OPTIMIZER, SCHEDULE, 3, match={"original": "x", "rows": 2.0, "own": own})
        module.matching, logged = ready(original, student, rows=2.0, own=own), {}
        module.log = lambda name, value, logged=logged, **_: logged.update({name: value})
        found[own] = module.training_step(SimpleNamespace(images=pixels, labels=labels), 0)
        assert found[own] == 2 * logged["train/match_rows"] + own * logged["train/loss"]
    of_labels = torch.nn.functional.cross_entropy(student(pixels), labels)
    torch.testing.assert_close(found[1.0], found[0.0] + of_labels)


def test_a_generator_matches_with_the_same_dropped_labels(monkeypatch):
    """Of labels half are dropped in training, for both models the same: equal models are not apart."""
    given = []
    student = model(class_dropout=0.5).train()
    original = model(class_dropout=0.5).eval()
    original.stem.register_forward_pre_hook(lambda _, args: given.append(args[2]))
    student.stem.register_forward_pre_hook(lambda _, args: given.append(args[2]))
    module = task(monkeypatch, student, match={"original": "x", "prediction": 3.0, "outputs": 1.0, "tokens": "own"})
    module.matching._read, logged = lambda *_: original, {}
    module.matching.prepare(student, PLACE, 4)
    module.log = lambda name, value, **_: logged.update({name: value})
    torch.manual_seed(0)
    loss = module.training_step(batch(size=16), 0)
    assert torch.equal(*given) and (given[0] == 4).any() and (given[0] != 4).any()
    assert logged["train/match_prediction"] < 1e-10 and logged["train/match_outputs"] < 1e-10
    torch.testing.assert_close(loss, logged["train/loss"])


WRONG = {
    "original": ({"original": None}, r"task: match needs the original, got task\.match\.original=null; give what was"),
    "keys": ({"row": 1}, r"task: match must be a dict with original, and may have model, tokens, own, rows, .*'row'"),
    "nothing": ({"rows": 0}, r"task: match has nothing to match, got rows, outputs and prediction 0; set task\.match"),
    "weight": ({"outputs": -1}, r"task: match\.outputs must be a number of at least 0, got -1; set task\.match\.outp"),
    "own": ({"own": "all"}, r"task: match\.own must be a number of at least 0, got 'all'; set task\.match\.own"),
    "tokens": ({"tokens": "mine"}, r"task: match\.tokens must be original or own, got 'mine'; set task\.match\.tokens"),
}


@pytest.mark.parametrize(("change", "text"), WRONG.values(), ids=WRONG)
def test_wrong_settings_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        Classification(vit(), OPTIMIZER, SCHEDULE, 3, match={"original": "x", "rows": 1.0} | change)


BESIDE = {
    "compile": ({"compile": True}, r"task: match follows single layers, got task\.compile=true; set task\.compile=fal"),
    "teacher": (
        {"distillation": "soft", "teacher": "vit_32px", "teacher_weights": "x"},
        r"task: a model matches another one by itself, got task\.match beside .*distillation=soft; set task",
    ),
    "token labels": ({"token_weight": 0.5}, r"by itself, got task\.match beside token_weight=0\.5 and"),
}


@pytest.mark.parametrize(("change", "text"), BESIDE.values(), ids=BESIDE)
def test_what_does_not_go_beside_it_is_refused(change, text):
    with pytest.raises(ValueError, match=text):
        Classification(vit(), OPTIMIZER, SCHEDULE, 3, match={"original": "x", "rows": 1.0}, **change)


@pytest.mark.parametrize("kind", ["FullySharded", "SequenceParallel"])
def test_models_in_pieces_are_refused(kind):
    with pytest.raises(ValueError, match=rf"task: match needs whole layers in every process, got {kind}; set trainer"):
        Matching("x", rows=1.0).spread(type(kind, (), {})())


PAIRS = {
    "depth": ({}, {"depth": 3}, {}, r"needs the same backbone with attention, got ViT with 2 layers in"),
    "map": ({}, {"image_size": 24}, {}, r"needs the same tokens, got .* \(4, 4, 0\) in the original and"),
    "classes": ({"num_classes": 5}, {}, {"prediction": 1}, r"needs the same classes, got 5 .* and 3; set task"),
    "no rows": (
        {},
        {"attention": "galerkin"},
        {},
        r"rows needs weights of attention that sum to one, got .*; set task",
    ),
    "keys": (
        {},
        {"attention": "window", "window": 2},
        {},
        r"rows needs the same heads and keys, got .*\(1, 2, 16, 16\)",
    ),
    "carry": ({"attention": "reversed"}, {}, {}, r"match calls single layers, got Reversed.* in .*; set task\.match"),
}


@pytest.mark.parametrize(("original", "student", "settings", "text"), PAIRS.values(), ids=PAIRS)
def test_models_that_are_no_pair_are_refused(original, student, settings, text):
    with pytest.raises(ValueError, match=text):
        ready(vit(**original), vit(**{"attention": "hedgehog"} | student), **{"rows": 1.0} | settings)


def test_another_backbone_is_refused():
    with pytest.raises(
        ValueError,
        match=r"task: match needs the same backbone with attention, got ViT with 2 layers in the original and Swin",
    ):
        ready(vit(), create_model("swin_32px", num_classes=3), rows=1.0)


def test_an_original_that_cannot_be_read_is_one_sentence(file):
    for matching, text in (
        (
            Matching("/nowhere", rows=1.0),
            r"task: match\.original=/nowhere cannot be read: .*; give a run or a checkpoint",
        ),
        (Matching(file, rows=1.0), r"cannot be read: .*no configuration.*name of the model in task\.match\.model"),
        (
            Matching(file, model="vit_tiny", rows=1.0),
            r"cannot be read: .*; give a run or a checkpoint of it, or the nam",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            matching.prepare(vit("hedgehog"), SimpleNamespace(image_size=32, channels=3), 3)


def test_a_file_is_read_by_the_name_of_its_model(tmp_path):
    dense = create_model("vit_32px", num_classes=3).eval()
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    matching = Matching(tmp_path / "dense.safetensors", model="vit_32px", rows=1.0)
    student, before = create_model("vit_32px", "hedgehog", num_classes=3), torch.get_rng_state()
    matching.prepare(student, SimpleNamespace(image_size=32, channels=3), 3)
    assert torch.equal(torch.get_rng_state(), before)
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(matching.original(pixels), dense(pixels)) and not matching.original.training


def matched(labelled, original, folder=None, resume=None, **settings):
    student = converted(original, "hedgehog")
    match = {"original": "x", "rows": 1.0} | settings
    module = Classification(student, OPTIMIZER | {"weight_decay": 0.0}, SCHEDULE, 3, match=match)
    module.matching._read = lambda *_: original
    data = images((labelled[0], None), augment={"scale": (0.3, 1.0), "hflip": 0.5})
    return module, fit(module, data, folder, resume, max_epochs=2)


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_a_resumed_run_is_the_same_and_its_checkpoints_have_no_original(own, labelled, tmp_path):
    original = vit().eval()
    before = {name: value.clone() for name, value in original.state_dict().items()}
    torch.manual_seed(4)
    module, trainer = matched(labelled, original, tmp_path / "whole", own=own)
    expected = state(module, trainer)
    step = tmp_path / "whole" / "checkpoints" / "step-00000001"
    torch.manual_seed(9)
    found = state(*matched(labelled, original, tmp_path / "again", resume=step, own=own))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    names = vit("hedgehog").state_dict().keys()
    for ema in (False, True):
        assert load_weights(tmp_path / "again" / "checkpoints" / "last", ema=ema).keys() == names
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.model.parameters()} == {id(p) for p in module.parameters()}
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())


RUN = ("logger=none", "data.workers=0", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1")


@pytest.mark.full
def test_the_recipes_convert_a_small_model(command, tmp_path):
    """Both phases by what a user types: the first trains the features alone, the second everything."""
    small = ("model.dim=32", "model.depth=2", "trainer.max_epochs=1", *RUN)
    assert command("train", "recipe=moh/dense_digits", *small, "run.name=dense")[0] == 0
    last = "outputs/dense/checkpoints/last"
    status, out, err = command("train", "recipe=hedgehog/mimic_digits", f"init={last}", *small, "run.name=mimic")
    assert status == 0, err
    assert "frozen: stem, norm, head, *.norm1, *.norm2, *.mlp, *.qkv, *.proj" in out
    dense, mimic = load_weights(last), load_weights("outputs/mimic/checkpoints/last")
    assert all(torch.equal(mimic[name], value) for name, value in dense.items())
    changed = {
        name for name in mimic.keys() - dense.keys() if not torch.equal(mimic[name], torch.eye(4).expand(8, 4, 4))
    }
    assert changed == mimic.keys() - dense.keys() and all("feature_" in name for name in changed)
    figures = json.loads((tmp_path / "outputs/mimic/metrics.json").read_text())
    assert figures["train/match_rows"] > 0
    status, _, err = command("train", "recipe=hedgehog/tune_digits", "init=outputs/mimic", *small, "run.name=tuned")
    assert status == 0, err
    status, _, err = command("train", "recipe=hedgehog/mimic_digits", *small, "run.name=none")
    assert status == 2 and "init: this recipe fine-tunes, got no weights; give those of recipe=moh/dense_digits" in err


@pytest.mark.full
def test_the_recipe_for_deit_reads_timms_weights(command, tmp_path):
    """One step of its first phase at full size."""
    save_file(timm.create_model("deit_small_patch16_224").state_dict(), tmp_path / "deit.safetensors")
    tiny = ("data=fake", "data.batch_size=2", "global_batch=2", "trainer.max_steps=1", "trainer.precision=32-true")
    given = ("recipe=hedgehog/mimic_deit_small", f"init={tmp_path / 'deit.safetensors'}", *tiny, *RUN, "run.name=deit")
    status, out, err = command("train", *given)
    assert status == 0, err
    assert "new      589,824 parameters: core.feature_q.weight (12), core.feature_k.weight (12)" in out
    assert "0.59 of 22.26 M parameters are trained" in out


@pytest.mark.full
def test_a_diffusion_model_gets_neighbourhoods(command, tmp_path):
    """A step of the original, then of its conversion, by what a user types: only the layers of attention change."""
    small = ("model.dim=24", "model.depth=2", "attention.shared_heads=3", "attention.routed_heads=2")
    small += ("task.sampling.steps=2", "task.score.samples=null", "trainer.max_epochs=1", *RUN)
    given = ("model=moh_dit_s_2", "task=generation", "data=digits", *small, "run.name=whole")
    assert command("train", *given)[0] == 0
    given = ("recipe=clear/neighborhood_dit_digits", "init=outputs/whole/checkpoints/last", *small, "run.name=near")
    status, _, err = command("train", *given)
    assert status == 0, err
    whole, near = (load_weights(f"outputs/{name}/checkpoints/last") for name in ("whole", "near"))
    changed = {name for name in whole if not torch.equal(whole[name], near[name])}
    assert whole.keys() == near.keys() and changed and all(".attn." in name for name in changed)
    figures = json.loads((tmp_path / "outputs/near/metrics.json").read_text())
    assert figures["train/match_outputs"] > 0 and figures["train/match_prediction"] >= 0
    status, out, err = command(
        "eval", "recipe=clear/neighborhood_dit_digits", "ckpt=outputs/near", "task.sampling.steps=2"
    )
    assert status == 0 and "nothing published to compare with" in out, err


@pytest.mark.full
def test_features_learn_to_mimic_softmax(command):
    """A ViT of the digits, 12 epochs: the rows of every layer come nearer, and what a bare swap loses comes back."""
    run = ("logger=none", "data.workers=0", "model.dim=48", "model.depth=3")
    assert command("train", "recipe=moh/dense_digits", *run, "trainer.max_epochs=12", "run.name=dense")[0] == 0
    given = ("init=outputs/dense/checkpoints/last", *run, "trainer.max_epochs=3")
    assert command("train", "recipe=hedgehog/mimic_digits", *given, "run.name=mimic")[0] == 0
    dense, mimic = (create_from(f"outputs/{name}/checkpoints/last") for name in ("dense", "mimic"))
    bare = create_model("vit_32px", "hedgehog", dim=48, depth=3, num_heads=8, num_classes=10).eval()
    bare.load_state_dict(transplanted(dense.state_dict(), bare).weights)
    pixels = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad(), followed(dense) as theirs:
        dense(pixels)
        before, after = (layers_apart("rows", dense, net, theirs) for net in (bare, mimic))
    assert list(before) == [name for name, _ in mixers_of(dense)]
    assert all(after[name] < 0.7 * before[name] for name in before), (before, after)
