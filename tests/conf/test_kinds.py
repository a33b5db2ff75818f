"""A value of another kind than its place takes is refused for every key, before anything is imported for it."""

import copy
import datetime
import functools
import itertools
import re
import subprocess
import sys
from functools import cache

import pytest
import yaml
from omegaconf import OmegaConf, open_dict

from conf import families, kinds, names, recipes, settings
from conf.errors import UserError
from conf.signatures import Kind, kind_of, signature
from tests.compositions import compose_once

TINY = ("model=vit_32px", "data=fake")
RUN = {"name": "x", "model": "x", "attention": "x", "data": "x", "recipe": None}
AWKWARD = ("abc", -5, [], {"a": 1}, 1e30, True, 1.5, "")


@cache
def composed(*arguments):
    """Not to be changed."""
    cfg, _ = compose_once(list(arguments))
    with open_dict(cfg):
        cfg.run = RUN
    return cfg


def leaves(node, path=""):
    """Every setting, with what stands there."""
    for name, value in node.items():
        key = f"{path}.{name}" if path else name
        if isinstance(value, dict):
            yield from leaves(value, key)
        else:
            yield key, value


def keys(node):
    """Every setting that stands for itself."""
    for key, value in leaves(node):
        computed = isinstance(value, str) and "${" in value
        if not (key.rpartition(".")[2].startswith("_") or key.startswith("run.") or computed):
            yield key


@pytest.fixture(scope="module")
def accepted():
    """What of awkward values for all keys passes; everything else is one sentence."""
    cfg, found = composed(*TINY), {}
    config, written = settings.resolved(cfg), dict(leaves(OmegaConf.to_container(cfg)))
    for key in keys(OmegaConf.to_container(cfg)):
        places = [place for place, value in written.items() if place == key or value == f"${{{key}}}"]
        for value in AWKWARD:
            changed = copy.deepcopy(config)
            for *parents, last in (place.split(".") for place in places):
                functools.reduce(dict.__getitem__, parents, changed)[last] = value
            try:
                settings.check_values(changed)
            except UserError as error:
                assert len(str(error).splitlines()) == 1, error
            else:
                found.setdefault(key, []).append(value)
    return found


@pytest.mark.full
@pytest.mark.case(45)
def test_awkward_values_are_refused_for_every_key(accepted):
    """Words for words, numbers for numbers; parts of the model, of augmentation and views look at their own."""
    own = ("augment.", "model.", "attention.", "data.view", "logger.group", *names.PLACES)
    numbers = {key for key, values in accepted.items() if 1.5 in values and not key.startswith(own)}
    texts = {key for key, values in accepted.items() if "abc" in values and not key.startswith(own)}
    flags = {key for key, values in accepted.items() if True in values and not key.startswith(own)}
    assert not numbers & texts and not numbers & flags and not texts & flags
    others = {key: values for key, values in accepted.items() if not key.startswith(own)}
    assert {key for key, values in others.items() if -5 in values or 1e30 in values} == set()
    lists = {key for key, values in others.items() if [] in values}
    assert lists <= {
        "data.mean",
        "data.std",
        "optimizer.betas",
        "trainer.devices",
        "freeze",
        "task.class_weights",
        "logger.tags",
    }
    assert not any([] in values for key, values in accepted.items() if key.startswith(("model.", "attention.")))
    assert {key for key, values in others.items() if {"a": 1} in values} <= {"trainer.max_time", "task.match"}


@pytest.mark.case(45)
@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("trainer.deterministic=abc", "trainer: deterministic must be warn or true or false or null, got 'abc'"),
        ("trainer.gradient_clip_val=-5", "trainer: gradient_clip_val must be at least 0, got -5"),
        ("trainer.log_every_n_steps=-5", "trainer: log_every_n_steps must be at least 0, got -5"),
        ("trainer.log_every_n_steps=abc", "trainer: log_every_n_steps must be a whole number or null, got 'abc'"),
        ("trainer.max_steps=-5", "trainer: max_steps must be at least -1, got -5"),
        (
            "attention.qkv_bias=abc",
            "attention: qkv_bias must be true or false or a list, each true or false, got 'abc'",
        ),
        ("model.mlp_ratio=[]", "model: mlp_ratio must be a number, got []; set model.mlp_ratio"),
        ("model.depth=2.5", "model: depth must be a whole number, got 2.5; set model.depth"),
        ("task.gradient_checkpointing=abc", "task: gradient_checkpointing must be true or false, got 'abc'"),
        ("callbacks.ema.warmup=abc", "callbacks.ema: warmup must be true or false, got 'abc'"),
        ("optimizer.lr=1.0e+30", "optimizer: lr must be at most 10000, got 1e+30; set optimizer.lr"),
        ("logger.tags=-5", "logger: tags must be a list, got -5; set logger.tags"),
        ("data.source.train_images=1.5", "data.source: train_images must be a whole number, got 1.5"),
        ("global_batch=abc", "global_batch: must be a whole number or null, got 'abc'; set global_batch"),
    ],
)
def test_what_is_said(argument, said):
    cfg, (key, _, value) = copy.deepcopy(composed(*TINY)), argument.partition("=")
    OmegaConf.update(cfg, key, yaml.safe_load(value), merge=False)
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        settings.check(cfg)


@pytest.mark.case(45)
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("+foo=1", "there is no setting 'foo'"),
        ("+checkpoint.foo=1", "there is no setting 'checkpoint.foo'"),
        ("++run.nam=x", "there is no setting 'run.nam'; did you mean 'name'?"),
        ("+trainer.max_epoch=3", "there is no setting 'trainer.max_epoch'; did you mean 'max_epochs' or 'min_epochs'?"),
        ("+callbacks.ema.decai=3", "there is no setting 'callbacks.ema.decai'; did you mean 'decay'?"),
        ("+model.foo=3", "there is no setting 'model.foo'"),
        ("+schedule.foo=3", "there is no setting 'schedule.foo'"),
    ],
)
def test_what_nothing_reads_is_not_added(override, said):
    config = settings.resolved(composed(*TINY))
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        kinds.check_added(config, [*TINY, override])


def test_what_something_reads_is_added():
    config = settings.resolved(composed(*TINY))
    overrides = ["+trainer.overfit_batches=2", "+optimizer.momentum=0.9", "+callbacks.mine._target_=a.B", "+gate=eca"]
    kinds.check_added(config, [*TINY, *overrides, "+data.timeout=5", "+hydra.x=1", "+logger.notes=x"])
    kinds.check_added(config, ["++image_size=64", "++model.gate_at=mlp", "+model.norm=rms", "++attention.window=7"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["checkpoint.every_minutes=null"],
        ["checkpoint.every_minutes=0.5"],
        ["optimizer.eps=null", "optimizer.betas=null"],
        ["schedule.sched=step", "+schedule.decay_epochs=30", "+schedule.decay_rate=0.1"],
        ["+trainer.num_sanity_val_steps=-1"],
        ["+callbacks.mine={_target_:pytorch_lightning.callbacks.ModelCheckpoint,save_top_k:-1}"],
        ["checkpoint.monitor=null"],
        ["logger.job_type=null", "trainer.max_time=00:12:00:00", "trainer.devices=[0,1]"],
    ],
)
def test_what_is_offered_or_usual_is_not_refused(arguments):
    cfg = composed(*TINY, *arguments)
    settings.check(cfg)
    kinds.check_added(settings.resolved(cfg), arguments)


def test_no_default_and_no_plan_is_refused():
    settings.check(composed(*TINY))
    for plan in families.plans().values():
        kinds.check_kinds({"attention": of_its_mechanism(plan)})


def of_its_mechanism(plan):
    """With what it starts from, whose code says what settings take."""
    starts = [re.fullmatch(r"/attention/(\w+)@_here_", str(entry)) for entry in plan.get("defaults", ())]
    files = [yaml.safe_load((families.CONF / f"attention/{start[1]}.yaml").read_text()) for start in starts if start]
    whole = functools.reduce(families._merged, [*files, plan], {})
    return {name: value for name, value in whole.items() if name != "defaults"}


def literal(node):
    """What of a file needs nothing else to be computed."""
    values = {name: literal(value) if isinstance(value, dict) else value for name, value in node.items()}
    return {
        name: value
        for name, value in values.items()
        if not (isinstance(value, str) and re.search(r"\$\{|\?{3}", value))
    }


def test_no_value_of_a_file_is_refused():
    """Each file of conf/ and each row of a table by itself, so without composing it."""
    judged = 0
    for path, node in kinds._documents():
        for part in reversed(path.split(".") if path else ()):
            node = {part: node}
        kinds.check_kinds(literal(node))
        judged += 1
    for row in families.models().values():
        kinds.check_kinds(literal({"model": row["model"], "image_size": row["image_size"]}))
        judged += 1
    assert judged > 250


def test_files_of_ones_own_narrow_nothing_and_widen_what_they_give(monkeypatch):
    """A mechanism that is a list, numbers below zero, and numbers as Hydra reads them."""
    own = {"offset": -0.5, "source": {"angle": -3, "scale": "1e-3", "since": datetime.date(2026, 1, 1)}}
    documents = [*kinds._documents(), ("", {"attention": [{"window": 7}]}), ("data", own)]
    monkeypatch.setattr(kinds, "_documents", lambda: documents)
    readers = [kinds._files, kinds._below_zero]
    try:
        for reader in readers:
            reader.cache_clear()
        kinds.check_kinds({"attention": None, "data": own | {"source": {"angle": -90, "scale": 0.001, "shear": -0.5}}})
        kinds.check_kinds({"attention": [{"window": 7}], "data": {"offset": 2.5}})
        for key, config in {"data.offse": {"offse": -1}, "data.source.cells": {"source": {"cells": -1}}}.items():
            with pytest.raises(UserError, match=f"must be at least 0, got -1; set {key}"):
                kinds.check_kinds({"data": config})
    finally:
        for reader in readers:
            reader.cache_clear()


@pytest.mark.full
@pytest.mark.parametrize("group", ["trainer", "logger", "augment", "debug", "data"])
def test_no_option_of_a_group_is_refused(group, tmp_path):
    """As it is composed, with what it needs."""
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
    for option in names.options(group):
        needed = {"imagefolder": [f"data.root={tmp_path}"], "imagelist": ["data.num_classes=2"]}
        needed["huggingface"] = ["data.num_classes=2", "data.source.path=x"]
        needed["webdataset"] = ["data.num_classes=2", "data.source.train=a.tar", "data.source.val=b.tar"]
        kinds.check_kinds(settings.resolved(composed(f"{group}={option}", *needed.get(option, ()))))


def together(**groups):
    """Arguments in which every option of these groups is chosen once, one of each group at a time."""
    for chosen in itertools.zip_longest(*groups.values()):
        yield [f"{group}={option}" for group, option in zip(groups, chosen, strict=True) if option is not None]


@pytest.mark.full
def test_no_model_no_mechanism_and_no_part_is_refused():
    """Together, as far as they are computed from each other: sizes of a family share one table."""
    parts = {f"attention/{part}": names.options(f"attention/{part}") for part in names.PARTS}
    others = {group: names.options(group) for group in ("optimizer", "schedule", "callbacks", *names.PLACES)}
    models = [*families.small(), *families.files()]
    written = [name for name in names.options("attention") if name not in map("plan/{}".format, families.plans())]
    for arguments in together(model=models, attention=written, **others):
        given = [*arguments, *["model.name=resnet18"] * ("model=timm" in arguments)]
        kinds.check_kinds(settings.resolved(composed(*given)))
    for arguments in together(**parts):
        kinds.check_kinds(settings.resolved(composed("model=vit_32px", *arguments)))


@pytest.mark.full
def test_no_recipe_of_ours_is_refused(tmp_path):
    """Those of papers are judged with their numbers."""
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
    for name in recipes.names():
        if name.endswith("_in1k"):
            continue
        cfg = composed(f"recipe={name}")
        if "root" in cfg.data:
            cfg.data.root = str(tmp_path)
        kinds.check_kinds(settings.resolved(cfg))


@pytest.mark.parametrize(
    ("annotation", "takes", "refuses"),
    [
        ("int | None", [1, None], [1.5, "1", True, []]),
        ("Sequence[int] | int", [[1, 2], 3], [[1.5], "x", None]),
        ("Optional[Union[int, str]]", [1, "x", None], [1.5, []]),
        ("Literal['a', 'b']", ["a"], ["c", 1, None]),
        ("tuple[float, ...]", [[1, 2.5]], [["x"], 1]),
        ("Mapping[str, Any]", [{}], [[], 1]),
        ("str | os.PathLike", ["x"], [1]),
        ("Callable[..., Any]", [1, "x", None, []], []),
    ],
)
def test_annotations_say_what_is_taken(annotation, takes, refuses):
    import ast

    kind = kind_of(ast.parse(annotation, mode="eval").body)
    assert all(map(kind.takes, takes)) and not any(map(kind.takes, refuses))


def test_signatures_are_read_without_an_import():
    code = (
        "import sys; from conf.signatures import signature; s = signature('pytorch_lightning.Trainer'); "
        "assert 'max_epochs' in s.parameters and not s.others; "
        "assert not {'torch', 'pytorch_lightning', 'numpy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=settings.CONF.parent)
    task = signature("models.tasks.classification.Classification")
    assert {"label_smoothing", "compile"} <= task.parameters.keys()  # its own, and those of its base
    assert signature("somewhere.Else") is None
    assert str(Kind(frozenset({"int", "float", "none"}))) == "a number or null"
