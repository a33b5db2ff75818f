"""What is evaluated: a checkpoint of ours, a published file of weights or a model before training, and its data."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from conf.errors import UserError
from conf.folders import escaped
from conf.inputs import images_of
from data.sources.pictures import Pictures
from data.sources.relabelled import Relabelled
from models.checkpoints import built_within, check_stored, load_weights, read_config, read_manifest, resolve
from models.checkpoints.format.directory import EMA, of_run
from models.checkpoints.format.parts import has
from models.checkpoints.hub import is_name
from models.checkpoints.packed import config_of
from models.engines.strategies import engine
from models.probes import Subject
from models.runs.broken import refuse_broken
from models.runs.headline import title
from models.runs.identity import differences
from models.runs.initial import in_our_names
from models.runs.machine import check_accelerator
from models.runs.memory import shortage
from models.runs.preflight import check_data, part_of
from models.runs.results import FOLDER
from models.runs.useful import is_weights

SHOWN = 5  # names in a message before it says how many more there are


class Weights(NamedTuple):
    """Weights that are evaluated, and what is known of them.

    title: for people. known: for the files of results. path: of the checkpoint, as it is called. latest: the file of
    figures that every evaluation of these weights renews. load: `ema -> weights, or None`. num_classes, classes: of the
    model, and their names in training where they are known. averaged: whether the best was chosen by averaged weights.
    """

    title: str
    known: dict[str, Any]
    path: Path
    latest: Path
    load: Callable[[bool], dict[str, Tensor] | None]
    num_classes: int | None = None
    classes: list[str] | None = None
    averaged: bool = False

    @property
    def folder(self) -> Path:
        """Where results belong: in the folder of the run, or beside the file."""
        place = self.path.parent
        found = (place.parent if place.name == "checkpoints" and self.path.is_dir() else place) / FOLDER
        return Path(FOLDER) if found.is_symlink() else found  # which may lead anywhere

    @property
    def name(self) -> str:
        return self.path.name if self.path.is_dir() else self.path.stem


def weights_of(cfg: DictConfig, given: dict[str, Any]) -> Weights:
    """What `ckpt=` names."""
    return _of_file(cfg, given) if is_weights(cfg.ckpt) else _of_directory(cfg, given)


def _of_directory(cfg: DictConfig, given: dict[str, Any]) -> Weights:
    """A checkpoint of ours: it says itself what it is."""
    named = of_run(Path(cfg.ckpt))
    try:
        path = resolve(named)
        config, step = read_config(path), read_manifest(path)["step"]
        check_stored(config)
    except OSError as error:
        raise UserError(str(error)) from error
    if changed := differences(config, given, ("attention", "model")):
        raise UserError(
            f"eval: the checkpoint was trained with {', '.join(changed)} as this command asks; leave that out, "
            "or train a model with it"
        )

    def load(ema: bool) -> dict[str, Tensor] | None:
        return None if ema and not has(path, EMA) else load_weights(path, ema=ema)

    known = {"checkpoint": str(path), "step": step}
    averaged = str((config.get("checkpoint") or {}).get("monitor")).endswith("_ema")
    return Weights(
        f"{title(config)}, step {step}",
        known,
        named,
        named.parent / "metrics.json",
        load,
        config["model"]["num_classes"],
        config.get("classes"),
        averaged,
    )


def _of_file(cfg: DictConfig, given: dict[str, Any]) -> Weights:
    """A file of weights, in the authors' names or in ours, of the model that the recipe or the command line names."""
    path, classes = Path(cfg.ckpt), given["model"]["num_classes"]
    carried = config_of(cfg.ckpt) or {}
    check_stored(carried)
    if is_name(cfg.ckpt):  # results go to the working directory
        path = Path(path.name.rpartition(":")[2])

    def load(ema: bool) -> dict[str, Tensor] | None:
        try:
            content = load_weights(cfg.ckpt, ema)
        except UserError:
            if not ema:
                raise
            return None  # the raw weights were there: the file has no average
        state, notes = in_our_names(content, given, classes)
        for note in notes if not ema else ():
            print(escaped(note))
        return state

    known = {"checkpoint": str(cfg.ckpt), "model": given["run"]["model"]}
    latest = path.with_name(f"{path.name}.metrics.json")
    return Weights(f"{title(given)}, {path.name}", known, path, latest, load, classes=carried.get("classes"))


class Parts:
    """What probes may ask for (`conf.probes.GIVEN`), each built when it is: `Parts(cfg, given).made(wanted)`."""

    def __init__(self, cfg: DictConfig, given: dict[str, Any]) -> None:
        self.cfg, self.given = cfg, given
        self.weights = weights_of(cfg, given) if given.get("ckpt") is not None else None

    def made(self, wanted: tuple[str, ...]) -> dict[str, Any]:
        """By name; the data comes first, since looking at it costs least."""
        parts: dict[str, Any] = {"input": self.given.get("input")}
        if "input" in wanted and parts["input"] is not None:
            parts["data"] = self._pictures()
        elif "data" in wanted:
            parts["data"] = self._data("model" in wanted)
        weights = "raw"
        if {"model", "network"} & set(wanted):
            model, ema = self._models("ema" in wanted)
            weights = self._chosen(ema)
            parts["model"] = parts["network"] = model if "ema" in wanted or weights == "raw" else ema
            parts["ema"] = ema
        if {"model", "network", "trainer"} & set(wanted):
            trainer = parts["trainer"] = self._trainer()
            for model in filter(None, (parts.get("model"), parts.get("ema"))):
                self._placed(model, trainer.strategy.root_device)
        parts["subject"] = self._subject(weights)
        return parts

    def _pictures(self) -> pl.LightningDataModule:
        """The images of the user, prepared as the model's evaluation does; those of training need not be there."""
        images = images_of(self.given["input"])
        if images.left_out:
            print(f"left out of {self.given['input']}, as they are no images: {images.left_out}")
        data = part_of(self.cfg, "data")
        trained = self.weights.classes if self.weights is not None else None
        data.source = Pictures(images.files, legible(trained or _names(data), data.num_classes))
        check_data(data, training=False)
        return data

    def _models(self, both: bool) -> tuple[nn.Module, nn.Module | None]:
        """With raw and with averaged weights, where these are asked for or may be chosen, and are there."""
        which = self.given.get("weights", "auto")
        if which not in ("raw", "ema", "auto"):
            raise UserError(f"eval: weights must be raw, ema or auto, got {which!r}; leave it out for auto")
        averaged = self.weights is not None and (both or which == "ema" or (which == "auto" and self.weights.averaged))
        return self._model(False), self._model(True) if averaged else None

    def _chosen(self, ema: nn.Module | None) -> str:
        which = self.given.get("weights", "auto")
        if which == "ema" and ema is None:
            raise UserError("eval: the checkpoint has no averaged weights, got weights=ema; leave that out")
        by_average = self.weights is not None and self.weights.averaged and ema is not None
        return ("ema" if by_average else "raw") if which == "auto" else which

    def _placed(self, model: nn.Module, device: torch.device) -> None:
        """On its device, in the memory format and compiled as the command asks."""
        model.to(device)
        if self.given.get("channels_last"):
            model.to(memory_format=torch.channels_last)
        if self.given.get("compile"):
            model.compile()

    def _data(self, labelled: bool) -> pl.LightningDataModule:
        data = part_of(self.cfg, "data")
        if labelled and self.weights is not None:
            as_in_training(data, self.weights.classes, self.weights.num_classes)
        check_data(data, training=False)
        return data

    def _model(self, ema: bool) -> nn.Module | None:
        """The model with the weights of the checkpoint, or None where it has no average."""
        if self.weights is None:
            return None if ema else part_of(self.cfg, "model").eval()
        try:
            state = self.weights.load(ema)
            if state is None:
                return None
            model = built_within(self.given["ckpt"], lambda: part_of(self.cfg, "model"))
            _refuse_whole(state, model, self.given["ckpt"])
            model.load_state_dict(state)
        except (OSError, RuntimeError) as error:
            if shortage(error) is not None:
                raise
            raise UserError(str(error)) from error
        refuse_broken(model, f"eval: the {'averaged ' if ema else ''}weights of {self.given['ckpt']}")
        return model.eval()

    def _trainer(self) -> pl.Trainer:
        check_accelerator(self.cfg.trainer)
        settings, spread = engine(self.cfg.trainer)
        whole = {"logger": False, "enable_model_summary": False, "use_distributed_sampler": False}
        return part_of(settings, "trainer", **whole, **spread)

    def _subject(self, weights: str) -> Subject:
        found, given = self.weights, self.given
        named = given.get("output")
        if found is None:
            told = title(given) if (given.get("run") or {}).get("model") else ""
            return Subject(told, None, None, weights, given, Path(named or FOLDER))
        folder = Path(named) if named else found.folder
        return Subject(found.title, found.path, found.classes, weights, given, folder)


def _refuse_whole(state: dict[str, Tensor], model: nn.Module, path: str) -> None:
    """Weights of whole or complex numbers would be taken for others without a word."""
    for name, own in model.state_dict().items():
        if own.is_floating_point() and name in state and not state[name].is_floating_point():
            raise UserError(
                f"eval: weights must be real numbers, got {state[name].dtype} in {name} of {path}; convert them"
            )


def as_in_training(data: pl.LightningDataModule, trained: list[str] | None, num_classes: int | None) -> None:
    """Gives every class of the data the label that it had in training, by its name.

    The data may have some of the classes only, or others in their place in the order of their names.

    Args:
        data: not yet used.
        trained: the names in training, None where nobody knows them: the number must do.
        num_classes: of the model, None where the model is made for the data.

    Raises:
        UserError: the data has a class that training had not, or as many as the model cannot have.
    """
    names = _names(data) if trained is not None else None
    unknown = sorted(set(names) - set(trained), key=names.index) if names is not None else []
    if num_classes not in (None, data.num_classes) and (names is None or unknown):
        raise UserError(
            f"eval: the checkpoint has {num_classes} classes, the data has {data.num_classes}; "
            f"evaluate on the data it was trained for{_named(unknown)}"
        )
    if not names or names == trained:
        return
    if unknown:
        pairs = enumerate(zip(trained, names, strict=False))
        label, (was, now) = next(((i, both) for i, both in pairs if both[0] != both[1]), (-1, ("", "")))
        raise UserError(
            f"eval: the classes are not those of training: label {label} was {was!r} and is {now!r} here; "
            f"evaluate on folders with the same names{_named(unknown)}"
        )
    data.source, data.num_classes = Relabelled(data.source, trained), num_classes or len(trained)


def _names(data: pl.LightningDataModule) -> list[str]:
    """Of the classes of the data; [] where it cannot say, which the look at it reports."""
    try:
        return list(map(str, data.class_names))
    except (ValueError, OSError):
        return []


def legible(names: list[str], count: int) -> list[str]:
    """Class names for people: ImageNet's in words, and numbers for those that nobody knows."""
    if count == 1000 and (not names or all(re.fullmatch(r"n\d{8}", name) for name in names)):
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        return [info.label_name_to_description(name) for name in names or info.label_names()]
    return names if len(names) == count else [f"class {label}" for label in range(count)]


def _named(unknown: list[str]) -> str:
    more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
    return f" (training had no {', '.join(map(repr, unknown[:SHOWN]))}{more})" if unknown else ""
