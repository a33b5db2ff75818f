"""Recipes are found, listed in tables, run, and judged; what they state is tested in test_recipes_numbers.py."""

import json
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from conf import recipes, sweeps
from conf.compose import compose_run
from conf.names import PLACES
from models import create_model
from models.runs import verdict
from models.runs.initial import check_given
from models.runs.verdict import deviations, judge
from tests.compositions import compose_once

NAMES = recipes.names()
TINY = ("model.dims=[16,32,32,64]", "model.depths=[1,1,1,1]", "image_size=64", "data.batch_size=4", "global_batch=8")
RUN = ("trainer.max_steps=2", "trainer.precision=32-true", "logger=none", "data.workers=0", "trainer.accelerator=cpu")


# How they are found


def test_bases_are_no_recipes(command):
    assert not [name for name in NAMES if name.startswith("_")]
    status, _, err = command("train", "recipe=_bases/swin", "logger=none")
    assert status == 2 and "recipe: there is no '_bases/swin'" in err


def test_a_recipe_has_what_its_bases_say_and_the_command_line_wins():
    """Three files deep: linear, cswin, cswin_384 and the recipe itself, over conf/."""
    cfg, choices = compose_run(["recipe=agent/cswin_base_384_in1k", "augment=light", "schedule.min_lr=1.0e-9"])
    assert choices["data"] == "imagenet1k" and cfg.seed == 0 and cfg.optimizer.betas == [0.9, 0.999]
    assert cfg.checkpoint.monitor == "val/top1_ema" and cfg.schedule.cooldown_epochs == 10
    assert cfg.optimizer.lr == 2.5e-6 and cfg.optimizer.weight_decay == 1e-8
    assert cfg.model.drop_path == 0.7 and cfg.schedule.min_lr == 1e-9 and choices["augment"] == "light"


def test_a_command_reads_its_own_recipe(monkeypatch):
    """With what it is based on, and no other; one after another in a process."""
    opened = []
    load = OmegaConf.load
    monkeypatch.setattr(OmegaConf, "load", lambda file: opened.append(Path(file.name)) or load(file))
    bases = {"agent/swin_tiny_in1k": {"_bases/swin.yaml", "_bases/linear.yaml"}}
    for name in ("davit/tiny_in1k", "agent/swin_tiny_in1k", "davit/base_in1k"):
        del opened[:]
        cfg, choices = compose_run([f"recipe={name}"])
        files = [path.resolve() for path in opened if recipes.ROOT in path.resolve().parents]
        read = {path.relative_to(recipes.ROOT).as_posix() for path in files}
        assert read == {f"{name}.yaml"} | bases.get(name, set())
        assert choices["recipe"] == name and cfg.target.paper == recipes.load(name).target.paper


def test_what_fine_tunes_anything_states_no_result_and_asks_for_weights():
    cfg, choices = compose_run(["recipe=finetune", "model=vit_32px", "attention=agent", "optimizer.lr=3e-4"])
    assert choices["attention"] == "agent" and choices["data"] == "digits" and "target" not in cfg
    assert (cfg.optimizer.lr, cfg.optimizer.layer_decay, cfg.trainer.max_epochs) == (3e-4, 0.75, 10)
    assert "finetune" in recipes.offered() and "finetune" not in NAMES
    config = OmegaConf.to_container(cfg)
    with pytest.raises(ValueError, match=r"fine-tunes, got no weights; give a file, the folder of a run or a name of"):
        check_given(config)
    for given in ({"init": "a.pth"}, {"fine_tunes": None}, {"model": {"pretrained": True}}):
        check_given(config | given)


def test_the_comparison_on_pathfinder_sweeps_mechanisms_and_seeds():
    """Nine runs, whose folders say what differs; it states no result, and a sweep of other mechanisms is one word."""
    assert "pathfinder" in recipes.offered() and "pathfinder" not in NAMES
    params = OmegaConf.to_container(recipes.load("pathfinder").hydra.sweeper.params)
    typed = ["recipe=pathfinder", "run.name=p"]
    assert sweeps.begin(typed, params) == 9
    assert sweeps.folder([*typed, "attention=agent", "seed=2"], 2) == "agent/seed-2"
    assert sweeps.begin([*typed, "attention=softmax,window"], params) == 6
    sweeps.end()
    cfg, choices = compose_run(["recipe=pathfinder", "attention=agent"])
    assert (choices["data"], choices["augment"], cfg.data.source.difficulty) == ("pathfinder", "none", "easy")


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


# One recipe of every protocol and backbone, with the settings of a model that is small enough.
HEADS = "model.num_heads=[1,2,2,4]"
PIXELS = ("model.latent_stride=1", "model.in_channels=3", "image_size=16", "task.sampling.steps=2", *TINY[3:])
SMALL = {
    "biformer/tiny_in1k": (*TINY, HEADS),
    "biformer/base_token_labels_in1k": (*TINY, HEADS),
    "convit/tiny_in1k": (
        "model.dim=16",
        "model.depth=2",
        "model.num_heads=2",
        "model.token_before=1",
        "attention.blocks=[1]",
        *TINY[2:],
    ),
    "davit/tiny_in1k": (*TINY, "model.num_heads=[1,1,2,2]"),
    "agent/deit_tiny_in1k": ("model.dim=16", "model.depth=2", "model.num_heads=2", *TINY[2:]),
    "agent/swin_tiny_in1k": (*TINY, HEADS),
    "ecanet/50_in1k": ("model.dims=[16,32,64,128]", *TINY[1:]),
    "flowformer/cv_in1k": (*TINY, "model.num_heads=[4,4,4,4]"),
    "focalnet/tiny_srf_in1k": (*TINY, HEADS),
    "flatten/pvt_tiny_in1k": (*TINY, HEADS),
    "flatten/pvt_v2_b0_in1k": (*TINY, HEADS),
    "illama/tiny_in1k": ("model.dim=16", "model.depth=2", "model.num_heads=2", *TINY[2:]),
    "inline/cswin_tiny_in1k": ("model.dims=[16,32,64,128]", "model.num_heads=[2,4,8,16]", *TINY[1:]),
    "l2vit/tiny_in1k": (*TINY, HEADS),
    "lit/small_in1k": (*TINY, HEADS),
    "maxvit/tiny_in1k": ("model.head_dim=16", *TINY),
    "moh/transnext_small_75_in1k": ("model.dims=[12,24,48,96]", *TINY[1:]),
    "moh/dit_s_2_90_in1k": (
        "model.dim=24",
        "model.depth=2",
        "attention.shared_heads=3",
        "attention.routed_heads=2",
        *PIXELS,
    ),
    "shvit/s1_in1k": ("model.dims=[16,32,64]", "model.depths=[1,1,1]", "model.num_heads=[1,2,4]", *TINY[2:]),
    "swiftformer/xs_in1k": (*TINY, HEADS),
    "nat/mini_in1k": (*TINY, HEADS),
    "dinat/s_tiny_in1k": (*TINY, HEADS),
    "vitrpb/small_in1k": ("model.dims=[16]", "model.depths=[2]", "model.num_heads=[2]", *TINY[2:]),
    "twins/svt_small_in1k": (*TINY, HEADS),
    "overlock/xt_in1k": (*TINY, "model.focus_depths=[1,1]", "model.num_heads=[1,2]"),
    "van/b0_in1k": (*TINY, HEADS),
    "xcit/nano_12_p16_in1k": ("model.dim=16", "model.depth=2", "model.num_heads=2", *TINY[2:]),
    "dit/s_2_in1k": ("model.dim=16", "model.depth=2", "model.num_heads=2", *PIXELS),
}


def test_one_recipe_of_every_paper_and_backbone_is_run():
    backbones = {"deit", "swin", "pvt", "pvt_v2", "cswin", "transnext", "dit"}
    published = [
        name for name in NAMES if name.endswith("_in1k")
    ]  # conversions: see tests/models/tasks/test_matching.py
    assert {name.partition("/")[0] for name in SMALL} == {name.partition("/")[0] for name in published}
    assert {b for b in backbones for name in SMALL if f"/{b}_" in name} == backbones


# one of each task; the others differ in the backbone or in a loss
QUICK = ("davit/tiny_in1k", "dit/s_2_in1k")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.full) for n in SMALL])
def test_two_steps_and_an_evaluation(name, command, images, tmp_path):
    """Two optimizer steps of two accumulated batches each, on images that fit, then the verdict of eval.py."""
    data = ["data=imagefolder", f"data.root={images}"]
    maps = [f"data.token_labels={images / 'maps'}"] if "token_labels" in name else []
    if "swiftformer" in name:
        teacher = tmp_path / "teacher.safetensors"
        save_file(create_model("timm/test_resnet", num_classes=2).state_dict(), teacher)
        maps += ["task.teacher=timm/test_resnet", f"task.teacher_weights={teacher}"]
    status, out, err = command("train", f"recipe={name}", *SMALL[name], *data, *maps, *RUN, "run.name=short")
    assert status == 0, err
    wanted = recipes.load(name).global_batch
    assert "batch 4 x 1 process x 2 accumulated = 8 images per step" in out
    assert f"the recipe trains with {wanted}" in out
    run = tmp_path / "outputs" / "short"
    assert json.loads((run / "metrics.json").read_text())["steps"] == 2
    ckpt = run / "checkpoints" / "last"
    status, out, err = command("eval", f"recipe={name}", *data, f"ckpt={ckpt}")
    assert status == 0, err
    verdict, metric = out.strip().splitlines()[-1], recipes.load(name).target.metric
    measured = metric != "fid"
    assert verdict.startswith(f"not reproduced: {metric} " if measured else "not judged: FID is not computed here, ")
    assert verdict.endswith(
        f"{'points' if measured else 'guided-diffusion'}, with data=imagefolder instead of imagenet1k"
    )
    assert json.loads((ckpt.parent / "metrics.json").read_text())["reproduced"] is (False if measured else None)


@pytest.mark.full
def test_fine_tuning_begins_with_the_weights_that_are_given(command, tmp_path):
    """Swin at 128 pixels with the weights of 64, by the recipe for 384 with those of 224."""
    fake = ("data=fake", "data.num_classes=2", "data.source.train_images=16", "data.source.val_images=4")
    small = (*fake, TINY[0], "model.depths=[1,1,2,1]", HEADS, *TINY[3:], *RUN)
    status, _, err = command("train", "recipe=inline/swin_base_384_in1k", *small, "image_size=128")
    assert status == 2 and err.strip().endswith(
        "init: this recipe fine-tunes, got no weights; give those of recipe=inline/swin_base_in1k: init=..., "
        "or fine_tunes=null to begin without"
    )
    status, _, err = command("train", "recipe=inline/swin_base_in1k", *small, "image_size=64", "run.name=first")
    assert status == 0, err
    last = tmp_path / "outputs" / "first" / "checkpoints" / "last"
    tuned = ("recipe=inline/swin_base_384_in1k", *small, "image_size=128", f"init={last}", "run.name=second")
    status, out, err = command("train", *tuned)
    assert status == 0, err
    assert f"starts from {last}" in out and "learning rate 1e-05 x 8/256" in out and "trains with 256" in out
    status, out, err = command("train", *(argument for argument in tuned if not argument.startswith("init=")))
    assert status == 0 and "continues from " in out, err
    ckpt = tmp_path / "outputs" / "second" / "checkpoints" / "last"
    status, out, err = command("eval", "recipe=inline/swin_base_384_in1k", f"ckpt={ckpt}", *fake)
    assert status == 0, err
    assert out.strip().splitlines()[-1].startswith("nothing published to compare with: val/top1 ")
    assert json.loads((ckpt.parent / "metrics.json").read_text())["reproduced"] is None


@pytest.mark.full
def test_a_recipe_in_a_sweep_from_another_folder_with_overrides(command, tmp_path):
    names = "davit/tiny_in1k,davit/small_in1k"
    fake = ("data=fake", "data.source.train_images=16", "data.source.val_images=4", "run.name=sweep")
    small = ("model.num_heads=[1,1,2,2]", "model.drop_path=0.05")  # DaViT's own setting, and everybody's
    status, out, err = command("train", "-m", f"recipe={names}", *TINY, *small, *fake, *RUN)
    assert status == 0, err
    assert "2 of 2 runs" in out and "++" not in out[out.index("2 of 2 runs") :]
    found = (tmp_path / "outputs" / "sweep").rglob("config.yaml")
    configs = sorted(path for path in found if path.parent.name != ".hydra")
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
    small = [argument for argument in SMALL["biformer/tiny_in1k"] if not argument.startswith(("data.", "global_"))]
    smoke = ("debug=fast", "trainer.precision=32-true", "data.workers=0")
    status, out, err = command("train", "recipe=biformer/tiny_in1k", *small, *smoke)
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


def test_a_verdict_without_averaged_weights():
    """The authors' file of raw weights alone, where the recipe asks for averaged ones."""
    verdict = judge("agent/cswin_tiny_in1k", {"val/top1": 0.829}, ["a=1 instead of 2"])
    assert verdict == (
        False,
        "not reproduced: val/top1_ema was not measured, as the weights have no average, published 83.1 % "
        "(arXiv:2312.08874); val/top1 is 82.900 %, with a=1 instead of 2",
    )


def test_a_verdict_on_samples():
    verdict = judge("moh/dit_s_2_90_in1k", {"val/loss": 0.2}, ["10 of 50,000 samples"])
    assert verdict == (
        None,
        "not judged: FID is not computed here, published 67.25 (arXiv:2410.11842) for 50,000 samples after 400,000 "
        "steps; write as many with samples=50000 and measure the file with the evaluation suite of "
        "openai/guided-diffusion, with 10 of 50,000 samples",
    )


def test_a_verdict_where_nothing_is_published():
    name = "flatten/pvt_large_in1k"
    assert judge(name, {"val/top1": 0.8412}, []) == (None, "nothing published to compare with: val/top1 84.120 %")
    assert judge(name, {"val/top1": 0.8412}, ["a"]).text.endswith("with: val/top1 84.120 %, with a")


def evaluation(*overrides: str, name: str = "biformer/tiny_in1k") -> dict:
    """What eval.py would work with, `data.root` and batch size set as a user does."""
    root = [] if "data=fake" in overrides else ["data.root=/somewhere"]
    cfg, choices = compose_once([f"recipe={name}", "data.batch_size=32", *root, *overrides])
    cfg.run = {"data": choices["data"]}
    kept = ["image_size", "attention", "model", "data", "run", "augment", "seed", *PLACES]
    kept += ["task"] if "dit" in name else []
    cfg.task = {"sampling": cfg.task.get("sampling")}
    return OmegaConf.to_container(OmegaConf.masked_copy(cfg, kept), resolve=True)


@pytest.mark.full
def test_nothing_is_reproduced_by_another_protocol(monkeypatch):
    monkeypatch.setattr(verdict, "compose_run", compose_once)
    name, whole = "biformer/tiny_in1k", (50_000, 50_000)
    assert deviations(name, evaluation("attention.backend=torch", "model.drop_path=0"), *whole) == []
    mixed = "agent/swin_tiny_in1k"  # agents in three stages, windows in one
    agents = evaluation("attention.backend=torch", "attention.first.agent_tokens=25", name=mixed)
    assert deviations(mixed, agents, *whole) == ["attention.first.agent_tokens=25 instead of auto"]
    assert deviations(name, evaluation("data=fake", "data.num_classes=1000"), *whole) == [
        "data=fake instead of imagenet1k"
    ]
    changes = {
        "data.eval.size=256": "data.eval.size=256 instead of 224",
        "data.eval.crop_fraction=1.0": "data.eval.crop_fraction=1.0 instead of 0.875",
        "model.depths=[1,1,1,1]": "model.depths=[1, 1, 1, 1] instead of [2, 2, 8, 2]",
        "attention.topk=2": "attention.topk=2 instead of [1, 4, 16, 'all']",
    }
    assert sorted(deviations(name, evaluation(*changes), *whole)) == sorted(changes.values())
    assert deviations(name, evaluation("image_size=256"), *whole)[0] == "image_size=256 instead of 224"
    assert any("attention._target_" in text for text in deviations(name, evaluation("attention=agent"), *whole))
    gated = "model.gate._target_=models.gates.eca.ECA instead of None"
    assert gated in deviations(name, evaluation("gate=eca"), *whole)
    as_published = evaluation()
    assert deviations(name, as_published, 1000, 1000) == ["1,000 of 50,000 images"]
    assert deviations(name, as_published, 50_000, 0) == ["0 of 50,000 images"]
    samples, given = "dit/xl_2_guided_in1k", {"samples": 50_000}
    for override, texts in [
        ("task.sampling.batch_size=8", []),
        ("task.sampling.guidance=4.0", ["sampling.guidance=4.0 instead of 1.5"]),
    ]:
        assert deviations(samples, evaluation(override, name=samples) | given, *whole) == texts
    assert deviations(samples, evaluation(name=samples), *whole) == ["0 of 50,000 samples"]
    text = judge(name, {"val/top1": 0.814}, ["a=1 instead of 2", "b", "c", "d"]).text
    assert text.startswith("not reproduced: ") and text.endswith(
        "+0.000 points, with a=1 instead of 2, b, c and 1 more"
    )
