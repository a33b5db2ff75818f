"""Every `conf/data/*.yaml` and `conf/augment/*.yaml`: a new file is tested without adding a line here."""

import dataclasses
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf

from conf.folders import count_class_folders
from data.augment import Augment
from data.module import ImageData
from models.factory import instantiate

CONF = Path(__file__).parents[2] / "conf"
DATA = sorted((CONF / "data").glob("*.yaml"))
AUGMENT = sorted((CONF / "augment").glob("*.yaml"))
KEYS = (
    "num_classes",
    "image_size",
    "batch_size",
    "augment",
    "seed",
    "workers",
    "eval",
    "mean",
    "std",
    "on_error",
    "subset",
)


def name(path):
    return path.stem


def augmentation(stem):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(f"augment/{stem}").augment


def composed(path, augment="none", **changes):
    values = {"seed": 3, "image_size": 16, "augment": augmentation(augment)}
    config = OmegaConf.create({**values, "data": OmegaConf.load(path)})
    OmegaConf.register_new_resolver("class_folders", count_class_folders, replace=True)
    for key, value in changes.items():
        OmegaConf.update(config, f"data.{key}", value)
    return config


def test_there_are_files():
    assert {path.stem for path in DATA} >= {"digits", "fake", "imagefolder", "imagenet1k", "huggingface"}
    assert {path.stem for path in AUGMENT} >= {"none", "light", "deit"}


@pytest.mark.parametrize("path", DATA + AUGMENT, ids=name)
def test_the_header_says_what_it_is_and_how_to_run_it(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and lines[1].startswith("#   python train.py ")
    assert f"{path.parent.name}={path.stem}" in lines[1]


@pytest.mark.parametrize("path", AUGMENT, ids=name)
def test_augmentations_are_plain_and_valid(path):
    config = augmentation(path.stem)
    assert set(config) == {field.name for field in dataclasses.fields(Augment)}  # so each can be overridden
    assert Augment.build(config).repeated >= 1


def test_none_is_what_the_code_does_by_default():
    assert dataclasses.replace(Augment.build(augmentation("none")), ratio=Augment.ratio) == Augment()


@pytest.mark.parametrize("path", DATA, ids=name)
def test_data_builds_without_reading(path, image_tree):
    needed = {"root": str(image_tree())} if "root" in OmegaConf.load(path) else {}
    needed |= {key: value for key, value in (("source.path", "none/such"), ("num_classes", 2)) if missing(path, key)}
    config = composed(path, **needed)
    assert config.data._target_ == "data.module.ImageData"
    assert all(key in config.data for key in KEYS)
    assert get_class(config.data.source._target_).__module__.startswith("data.sources.")
    data = instantiate(config.data)
    assert isinstance(data, ImageData) and data.num_classes == config.data.num_classes
    assert (data.seed, data.image_size) == (3, 16)


def missing(path, key):
    return OmegaConf.is_missing(*parent(OmegaConf.load(path), key))


def parent(config, key):
    *folders, last = key.split(".")
    for folder in folders:
        config = config.get(folder, OmegaConf.create())
    return config, last


@pytest.mark.parametrize("augment", AUGMENT, ids=name)
@pytest.mark.parametrize("path", [CONF / "data" / "digits.yaml", CONF / "data" / "fake.yaml"], ids=name)
def test_embedded_data_runs_with_every_augmentation(path, augment, recorder, trainer):
    data = instantiate(composed(path, augment.stem).data)
    model = recorder()
    trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=1).fit(model, data)
    assert [tuple(batch[3].shape) for batch in model.seen] == [(data.batch_size, 3, 16, 16)] * 2


def test_imagefolder_counts_its_classes(image_tree):
    config = composed(CONF / "data" / "imagefolder.yaml", root=str(image_tree(("a", "b", "c"))))
    assert config.data.num_classes == 3
    data = instantiate(config.data, batch_size=2)
    data.check()
    assert data.class_names == ["a", "b", "c"]


def test_imagefolder_without_a_root_says_what_to_set():
    with pytest.raises(Exception, match=r"set data.root=<root>, where images lie as <root>/train"):
        instantiate(composed(CONF / "data" / "imagefolder.yaml").data)
    with pytest.raises(ValueError, match=r"set data.root=<root>, where images lie as <root>/train"):
        instantiate(composed(CONF / "data" / "imagenet1k.yaml").data).check()
