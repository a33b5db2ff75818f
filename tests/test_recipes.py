"""Every recipe states the published numbers, composes to the recorded configuration, and runs."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from timm.optim import create_optimizer_v2
from torchvision.transforms import InterpolationMode, v2

import recipes
from conf.cli import compose_run
from data.augment import Augment
from data.transforms import Evaluation, EvaluationTransform, TrainTransform
from models.factory import build
from models.tasks.schedule import Schedule
from models.tasks.verdict import deviations, judge
from recipes import __main__ as table

GOLDENS = Path(__file__).parent / "goldens" / "recipes"
NAMES = recipes.names()
SIZES = {"biformer": ("tiny", "small", "base", "stl"), "davit": ("tiny", "small", "base")}
BIFORMER = [name for name in NAMES if name.startswith("biformer/")]
DAVIT = [name for name in NAMES if name.startswith("davit/")]
STEPS = 1251  # of an epoch: 1,281,167 images in batches of 1024
TINY = ("model.dims=[16,32,32,64]", "model.depths=[1,1,1,1]", "image_size=64", "data.batch_size=4", "global_batch=8")
RUN = ("trainer.max_steps=2", "trainer.precision=32-true", "logger=none", "data.workers=0", "trainer.accelerator=cpu")


def composed(name: str):
    return compose_run([f"recipe={name}"])


def test_the_recipes_of_the_papers_are_there():
    assert {f"{paper}/{size}_in1k" for paper, sizes in SIZES.items() for size in sizes} <= set(NAMES)


# What they compose to


def recorded(name: str) -> str:
    """Everything that decides a result, every default of conf/ included, as YAML."""
    cfg, choices = composed(name)
    for key in ("run", "hydra", "logger", "resume", "data.augment", "data.source", "task.model", "model.attention"):
        OmegaConf.update(cfg, key, None, force_add=True)
    cfg.run = {key: choices[key] for key in ("model", "attention", "data")}
    cfg.task = {key: cfg.task[key] for key in ("label_smoothing", "token_weight", "auxiliary")}
    return OmegaConf.to_yaml(cfg, resolve=True, sort_keys=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_configuration_is_the_recorded_one(name):
    """After a change that is meant: UPDATE_GOLDENS=1 pytest tests/test_recipes.py, and look at the difference."""
    golden = GOLDENS / f"{name}.yaml"
    if os.environ.get("UPDATE_GOLDENS"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(recorded(name))
    assert recorded(name) == golden.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_targets(name):
    target = recipes.load(name).target
    assert set(target) == {"paper", "source", "metric", "value", "tolerance", "images", "status"}
    assert target.paper.startswith("arXiv:") and target.metric in ("val/top1", "val/top1_ema")
    assert 70 < target.value < 95 and 0 < target.tolerance <= 0.3
    assert target.status in ("unverified", "forward", "trained")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *zip([f"biformer/{size}_in1k" for size in SIZES["biformer"]], (81.4, 83.8, 84.3, 82.7), strict=True),
        *zip([f"davit/{size}_in1k" for size in SIZES["davit"]], (82.8, 84.2, 84.6), strict=True),
        ("biformer/small_token_labels_in1k", 84.3),
        ("biformer/base_token_labels_in1k", 85.4),
    ],
)
def test_published_values(name, value):
    assert recipes.load(name).target.value == value


def test_only_recipes_that_are_named_are_read(monkeypatch):
    """And one that has been read keeps its content when a later command names another."""
    monkeypatch.setattr(recipes, "_read", set())
    read = []
    monkeypatch.setattr(recipes, "load", lambda name: read.append(name) or OmegaConf.create({"seed": 1}))
    stored = {}
    monkeypatch.setattr(recipes, "_store", stored.__setitem__)
    recipes.register(["model=vit_tiny", "recipe=davit/tiny_in1k", "seed=3"])
    assert read == ["davit/tiny_in1k"] and set(stored) == set(NAMES) and stored["davit/base_in1k"] == {}
    recipes.register(["recipe=davit/base_in1k"])
    assert stored["davit/tiny_in1k"] == stored["davit/base_in1k"] == {"seed": 1}
    recipes.register(["recipe=glob(*)"])
    assert len(read) == 2 + len(NAMES)
    recipes.register()
    assert len(read) == 2 + 2 * len(NAMES)


# The numbers of the training


def rates(name: str, epochs: list[float]) -> list[float]:
    """Learning rates at the given epochs of the run on ImageNet-1k, as the schedule sets them."""
    cfg, _ = composed(name)
    lr = cfg.optimizer.lr * cfg.global_batch / cfg.optimizer.reference_batch
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    settings = OmegaConf.to_container(cfg.schedule)
    schedule = Schedule(optimizer, settings, total=cfg.trainer.max_epochs * STEPS, per_epoch=STEPS)
    found = []
    for epoch in epochs:
        schedule.step_update(round(epoch * STEPS))
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("name", BIFORMER)
def test_learning_rates_of_biformer(name):
    """Cosine from 5e-4 x 1024 / 512 to 1e-5 over 300 epochs, warm-up of 5, set after each epoch: one epoch late."""
    end = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * 298 / 300))
    warm = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * 5 / 300))
    expected = [1e-6, 1e-6, 1e-6, 2.008e-4, 8.002e-4, warm, 5.05e-4, 5.05e-4, end]
    assert rates(name, [0, 1, 1.999, 2, 5, 6, 151, 151.9, 299]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", DAVIT)
def test_learning_rates_of_davit(name):
    """Cosine from 1e-3 to 1e-5 over 300 epochs step by step, warm-up of 5, 10 more epochs at 1e-5."""
    warm = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * 5 / 300))
    expected = [1e-6, 2.008e-4, warm, 5.05e-4, 1e-5, 1e-5]
    assert rates(name, [0, 1, 5, 150, 300, 309.999]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_batch_and_epochs(name):
    cfg, _ = composed(name)
    assert cfg.global_batch == 1024 and cfg.data.batch_size == 128 and cfg.image_size == 224
    assert cfg.trainer.max_epochs == (310 if name in DAVIT else 300)
    assert cfg.trainer.gradient_clip_val == (1.0 if name in DAVIT else None)
    assert cfg.trainer.precision == "16-mixed" and cfg.task.label_smoothing == 0.1
    assert cfg.seed == (42 if name in DAVIT else 0)
    if name in DAVIT:
        assert cfg.callbacks.ema is None
    else:
        assert (cfg.callbacks.ema.decay, cfg.callbacks.ema.warmup) == (0.99996, False)


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_spares_vectors_and_nothing_else(name):
    """0.05 on every matrix and kernel, those of the position convolutions included; none on biases and norms."""
    cfg, _ = composed(name)
    with torch.device("meta"):
        model = build(cfg)
    settings = OmegaConf.to_container(cfg.optimizer)
    settings = {key: value for key, value in settings.items() if key != "reference_batch" and value is not None}
    optimizer = create_optimizer_v2(model, **settings)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    spared = {key for key, p in model.named_parameters() if decay[id(p)] == 0}
    assert spared == {key for key, p in model.named_parameters() if p.ndim == 1}
    assert {decay[id(p)] for key, p in model.named_parameters() if key not in spared} == {0.05}
    convolutions = [key for key in decay_names(model) if key.endswith("position.proj.weight")]
    assert bool(convolutions) == ("stl" not in name) and not spared & set(convolutions)
    assert type(optimizer).__name__ == "AdamW"
    assert {(*group["betas"], group["eps"]) for group in optimizer.param_groups} == {(0.9, 0.999, 1e-8)}


def decay_names(model: torch.nn.Module) -> list[str]:
    return [key for key, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("name", "rate", "blocks"),
    [
        ("biformer/tiny_in1k", 0.1, 14),
        ("biformer/small_in1k", 0.15, 30),
        ("biformer/small_token_labels_in1k", 0.15, 30),
        ("biformer/base_in1k", 0.4, 30),
        ("biformer/base_token_labels_in1k", 0.4, 30),
        ("biformer/stl_in1k", 0.1, 12),
        ("davit/tiny_in1k", 0.1, 12),
        ("davit/small_in1k", 0.2, 24),
        ("davit/base_in1k", 0.4, 24),
    ],
)
def test_drop_path_of_every_block(name, rate, blocks):
    with torch.device("meta"):
        model = build(composed(name)[0])
    found = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert found == pytest.approx([rate * i / (blocks - 1) for i in range(blocks)])


@pytest.mark.parametrize("name", NAMES)
def test_training_images(name):
    """Random resized crop, mirror, RandAugment, in this order; then erasing and mixing of batches."""
    cfg, _ = composed(name)
    augment = Augment.build(OmegaConf.to_container(cfg.augment))
    crop, mirror, policy = TrainTransform(augment, cfg.image_size, cfg.data.mean).steps
    assert isinstance(crop, v2.RandomResizedCrop) and isinstance(mirror, v2.RandomHorizontalFlip)
    assert (tuple(crop.size), crop.scale, crop.interpolation) == ((224, 224), (0.08, 1.0), InterpolationMode.BICUBIC)
    assert crop.ratio == pytest.approx((3 / 4, 4 / 3)) and mirror.p == 0.5
    assert type(policy).__name__ == "RandAugment" and policy.num_layers == 2
    assert {(op.magnitude, op.magnitude_std, op.prob) for op in policy.ops} == {(9, 0.5, 0.5)}
    assert "PosterizeIncreasing" in {op.name for op in policy.ops}
    assert augment.erase_mixed == (name in DAVIT)
    assert (augment.erasing, augment.cutmix, augment.mix_probability, augment.switch_probability) == (0.25, 1, 1, 0.5)
    assert augment.mixup == (0 if "token_labels" in name else 0.8)
    assert augment.repeated == (1 if name in DAVIT else 3)
    assert cfg.task.token_weight == (0.5 if "token_labels" in name else 0)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_images(name):
    """Shorter side to 256 (BiFormer) or 248 (DaViT), bicubic, centre of 224."""
    cfg, _ = composed(name)
    transform = EvaluationTransform(Evaluation.build(OmegaConf.to_container(cfg.data.eval, resolve=True)), 224)
    assert transform.target == [248 if name in DAVIT else 256] and transform.mode == InterpolationMode.BICUBIC
    assert transform(Image.new("RGB", (640, 480))).shape == (3, 224, 224)
    assert list(cfg.data.mean) == [0.485, 0.456, 0.406] and list(cfg.data.std) == [0.229, 0.224, 0.225]


# The table


def test_tables_are_current(capsys):
    table.main([])
    printed = capsys.readouterr().out.strip()
    assert printed.count("\n") == len(NAMES) + 1
    for file in table.FILES:
        assert printed in file.read_text(), "run: python -m recipes --write"


def test_a_wrong_option_of_the_table():
    with pytest.raises(SystemExit, match=r"recipes: no such option, got --wirte; use python -m recipes \[--write\]"):
        table.main(["--wirte"])


# Running one


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """An image folder of two classes, and label maps for its training images."""
    root = tmp_path_factory.mktemp("recipe")
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 4)):
        for label in range(2):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 255, (80, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
                if split == "train":
                    path = root / "maps" / f"class{label}" / f"{i}.npz"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    scores = generator.standard_normal((2, 3, 3)).astype(np.float16)
                    np.savez(path, scores=scores, classes=np.tile(np.arange(2)[:, None, None], (1, 3, 3)))
    return root


def reduced(name: str) -> list[str]:
    heads = "model.num_heads=[1,1,2,2]" if name in DAVIT else "model.num_heads=[1,2,2,4]"
    return [f"recipe={name}", *TINY, heads]


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_and_an_evaluation(name, command, images, tmp_path):
    """Two optimizer steps of two accumulated batches each, on images that fit, then the verdict of eval.py."""
    data = ["data=imagefolder", f"data.root={images}"]
    maps = [f"data.token_labels={images / 'maps'}"] if "token_labels" in name else []
    status, out, err = command("train", *reduced(name), *data, *maps, *RUN, "run.name=short")
    assert status == 0, err
    assert "batch 4 x 1 process x 2 accumulated = 8 images per step" in out and "the recipe trains with 1024" in out
    run = tmp_path / "outputs" / "short"
    assert json.loads((run / "metrics.json").read_text())["steps"] == 2
    ckpt = run / "checkpoints" / "last"
    status, out, err = command("eval", f"recipe={name}", *data, f"ckpt={ckpt}")
    assert status == 0, err
    verdict = out.strip().splitlines()[-1]
    assert verdict.startswith("not reproduced: val/top1 ")
    assert verdict.endswith("points, with data=imagefolder instead of imagenet1k")
    assert json.loads((ckpt.parent / "metrics.json").read_text())["reproduced"] is False


def test_a_recipe_in_a_sweep_from_another_folder_with_overrides(command, tmp_path):
    names = "davit/tiny_in1k,davit/small_in1k"
    fake = ("data=fake", "data.source.train_images=16", "data.source.val_images=4", "run.name=sweep")
    small = ("model.num_heads=[1,1,2,2]", "model.drop_path=0.05")  # DaViT's own setting, and everybody's
    status, out, err = command("train", "-m", f"recipe={names}", *TINY, *small, *fake, *RUN)
    assert status == 0, err
    assert "2 of 2 runs" in out and "++" not in out[out.index("2 of 2 runs") :]
    configs = sorted((tmp_path / "outputs" / "sweep").glob("*/config.yaml"))
    chosen = [OmegaConf.load(path) for path in configs]
    assert {cfg.run.recipe for cfg in chosen} == set(names.split(","))
    assert [(cfg.model.drop_path, cfg.schedule.cooldown_epochs) for cfg in chosen] == [(0.05, 10)] * 2


def test_typos_in_a_sweep_are_found(command):
    sweep = ("-m", "recipe=davit/tiny_in1k,davit/small_in1k", "logger=none")
    status, _, err = command("train", *sweep, "model.num_headss=[1,1,2,2]")
    assert status == 2 and "there is no setting 'model.num_headss'" in err
    status, _, err = command("train", "-m", "attention=softmax,agent", "trainer.max_epoch=3", "logger=none")
    assert status == 2 and "did you mean 'max_epochs'" in err


def test_a_recipe_and_a_smoke_run(command):
    tiny = [argument for argument in reduced("biformer/tiny_in1k") if not argument.startswith(("data.", "global_"))]
    status, out, err = command("train", *tiny, "debug=fast", "trainer.precision=32-true", "data.workers=0")
    assert status == 0, err
    assert "learning rate 5e-04 x 2/512" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["recipe=biformer/tiny_in1kk"],
            "recipe: there is no 'biformer/tiny_in1kk'; did you mean 'biformer/tiny_in1k'",
        ),
        (["recipe=biformer/tiny_in1k"], "data.root: no image folder"),
        (
            ["recipe=biformer/base_token_labels_in1k", "data=fake"],
            "task.token_weight=0.5 and data.token_labels=None; set both",
        ),
        (["recipe=davit/tiny_in1k", "data=fake", "data.batch_size=96"], "global_batch: 1024 images per step cannot be"),
        (["recipe=biformer/tiny_in1k", "data=fake", "image_size=32"], "topk=16 is more than the 2x2 regions of a 2x2"),
    ],
)
def test_what_a_recipe_lacks_is_named(command, arguments, text):
    status, _, err = command("train", *arguments, "logger=none")
    assert status == 2 and text in err and "Traceback" not in err


# The verdict


@pytest.mark.parametrize(
    ("measured", "text"),
    [
        (0.8137, "reproduced: val/top1 81.370 %, {}, -0.030 points, 0.2 less are allowed"),
        (0.812, "reproduced: val/top1 81.200 %, {}, -0.200 points, 0.2 less are allowed"),
        (0.81198, "not reproduced: val/top1 81.198 %, {}, -0.202 points, 0.2 less are allowed"),
        (0.8, "not reproduced: val/top1 80.000 %, {}, -1.400 points, 0.2 less are allowed"),
        (
            0.83,
            "reproduced: val/top1 83.000 %, {}, +1.600 points, 0.2 less are allowed, which is more than runs "
            "differ by: is it the right data?",
        ),
    ],
)
def test_verdicts(measured, text):
    verdict = judge("biformer/tiny_in1k", {"val/top1": measured}, [])
    assert verdict.text == text.format("published 81.4 % (arXiv:2303.08810)")
    assert verdict.reproduced == text.startswith("reproduced")


def evaluation(*overrides: str) -> dict:
    """What eval.py would work with, `data.root` and batch size set as a user does."""
    root = [] if "data=fake" in overrides else ["data.root=/somewhere"]
    cfg, choices = compose_run(["recipe=biformer/tiny_in1k", "data.batch_size=32", *root, *overrides])
    cfg.run = {"data": choices["data"]}
    return OmegaConf.to_container(
        OmegaConf.masked_copy(cfg, ["image_size", "attention", "model", "data", "run", "augment", "seed"]), resolve=True
    )


def test_nothing_is_reproduced_by_another_protocol():
    name, whole = "biformer/tiny_in1k", (50_000, 50_000)
    assert deviations(name, evaluation("attention.backend=torch", "model.drop_path=0"), *whole) == []
    assert deviations(name, evaluation("data=fake", "data.num_classes=1000"), *whole) == [
        "data=fake instead of imagenet1k"
    ]
    for override, text in [
        ("data.eval.size=256", "data.eval.size=256 instead of 224"),
        ("data.eval.crop_fraction=1.0", "data.eval.crop_fraction=1.0 instead of 0.875"),
        ("model.depths=[1,1,1,1]", "model.depths=[1, 1, 1, 1] instead of [2, 2, 8, 2]"),
        ("attention.topk=2", "attention.topk=2 instead of [1, 4, 16, 'all']"),
    ]:
        assert deviations(name, evaluation(override), *whole) == [text]
    assert deviations(name, evaluation("image_size=256"), *whole)[0] == "image_size=256 instead of 224"
    assert any("attention._target_" in text for text in deviations(name, evaluation("attention=agent"), *whole))
    assert deviations(name, evaluation(), 1000, 1000) == ["1,000 of 50,000 images"]
    assert deviations(name, evaluation(), 50_000, 0) == ["0 of 50,000 images"]
    text = judge(name, {"val/top1": 0.814}, ["a=1 instead of 2", "b", "c", "d"]).text
    assert text.startswith("not reproduced: ") and text.endswith(
        "+0.000 points, with a=1 instead of 2, b, c and 1 more"
    )
