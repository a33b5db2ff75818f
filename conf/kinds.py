"""Whether every setting has a value of the kind that its place takes, before anything is imported for it.

What a place takes is what the code there says (`conf.signatures`: the annotations of what is built) and what the files
of conf/ give it; a number is also looked at whether anybody could mean it.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import yaml

from conf.errors import UserError
from conf.names import CONF, PLACES, choosable, nearest
from conf.signatures import ANY, Kind, kind_of, signature
from conf.source import GIVEN

# looked at by their own checks, or copies of other places
ELSEWHERE = ("probe", "hydra", "augment", "arguments", "others", "target")
OF_FILES = ("recipe", "image_size", "fine_tunes", "target")  # keys at the top that models and recipes bring along
COPIES = ("task.model", "task.optimizer", "task.schedule", "model.attention", "data.augment")
LARGEST = 1e12
# what neither code nor files say, as annotations, and from where to where numbers go
UNSAID = {
    "image_size": "int | Sequence[int]",
    "global_batch": "int | None",
    "init": "str | None",
    "resume": "str | None",
    "freeze": "str | Sequence[str] | None",
    "freeze_epochs": "int | float | None",
    "trainer.max_time": "str | Mapping | None",
    "checkpoint.every_minutes": "float | None",
    "checkpoint.monitor": "str | None",
    "optimizer.betas": "Sequence[float] | None",  # null: the optimizer's own
    "optimizer.eps": "float | None",
    "logger.entity": "str | None",
    "logger.job_type": "str | None",
    "logger.group": "str | int | None",
}
RANGES = {
    "optimizer.lr": (0, 1e4),
    "optimizer.weight_decay": (0, 1e4),
    "optimizer.eps": (0, 1),
    "optimizer.momentum": (0, 1),
    "optimizer.betas": (0, 1),
    "schedule.warmup_lr": (0, 1e4),
    "schedule.min_lr": (0, 1e4),
    "task.label_smoothing": (0, 1),
    "trainer.max_steps": (-1, 1e12),
    "trainer.max_epochs": (-1, 1e12),
    "trainer.devices": (-1, 1e6),
    "trainer.num_sanity_val_steps": (-1, 1e12),
}
# what may be below zero besides parts of a model, where only counts may not, and besides what files give below zero
SIGNED = ("data.mean", "data.std")
OF_SOURCES = ("seed", "train_images", "val_images", "val_fraction", "digits", "cells")  # others are of one's own source
TIMMS = {"schedule": "timm.scheduler.scheduler_factory.create_scheduler_v2"}  # what takes a group's settings too
OF_A_MODEL = ("model", "attention", *PLACES)


def check_kinds(config: dict[str, Any]) -> None:
    """Refuses the first value of another kind than its place takes, or that no place could mean.

    Args:
        config: resolved.

    Raises:
        UserError: with the key, what it must be, and the value.
    """
    for key, kind, value in _settings(config, "", None):
        if not kind.anything and not kind.takes(value):
            _refuse(key, str(kind), value)
        if value == [] and re.fullmatch(r"(model|attention)\.\w+", key):
            _refuse(key, "a value, or one for every stage or block", value)
        for number in _numbers(value):
            _check_number(key, number, value)


def check_added(config: dict[str, Any], overrides: Iterable[str]) -> None:
    """Refuses what `+key=value` adds where nothing reads it.

    Args:
        config: resolved.
        overrides: of the command line.

    Raises:
        UserError: with names that are near.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if not key.startswith("+") or (name := key.lstrip("+").partition("@")[0]) in choosable():
            continue
        known = _read_beside(config, name)
        if key.startswith("++") and name.partition(".")[0] in OF_A_MODEL:
            continue  # a sweep sets so what models have of each other's
        if known is not None and (leaf := name.rpartition(".")[2]) not in known:
            raise UserError(f"there is no setting {name!r}{nearest(leaf, known)}; leave {override!r} out")


def _read_beside(config: dict[str, Any], name: str) -> set[str] | None:
    """The keys that are read where a key is added; None where nobody knows."""
    parent = name.rpartition(".")[0]
    if not parent:
        return None if "probe" in config else {*_written(""), *choosable(), *OF_FILES}
    if parent.partition(".")[0] in (*ELSEWHERE, "optimizer", "logger", "debug") or parent == "callbacks":
        return None  # looked at elsewhere; callbacks may be anybody's
    node: Any = config
    for part in parent.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    if isinstance(node, dict) and "_target_" in node:
        found = signature(str(node["_target_"]))
        given = GIVEN if parent == "model" else ()
        return None if found is None or found.others else {*found.parameters, *_written(parent), *given, "_target_"}
    taken = signature(TIMMS[parent]) if parent in TIMMS else None
    return {*_written(parent), *(taken.parameters if taken is not None else ())} or None


def _settings(node: dict[str, Any], path: str, target: str | None) -> Iterator[tuple[str, Kind, Any]]:
    """Every setting with what its place takes; a part is entered, and so is a group that nothing is built of."""
    taken = signature(target) if target is not None else None
    files = _written(path)
    for name, value in node.items():
        key = f"{path}.{name}" if path else str(name)
        if str(name).startswith("_") or key in ELSEWHERE or key in COPIES:
            continue
        kind = taken.parameters.get(name, ANY) if taken is not None else ANY
        if isinstance(value, dict):
            inner = value.get("_target_")
            yield from _settings(value, key, inner if isinstance(inner, str) else None)
            if inner is not None:
                continue
        yield key, _together(key, kind, files.get(name)), value


def _together(key: str, code: Kind, files: Kind | None) -> Kind:
    """What the code takes, and what files give; of what is null in all files nothing is known."""
    if key in UNSAID:
        return kind_of(ast.parse(UNSAID[key], mode="eval").body)
    if key in _choosable():
        return ANY  # what an option is; one of one's own may be a list
    known = not code.anything and bool(code.words or code.choices)
    if files is None or files.anything or files.words == {"none"}:
        return code if known else ANY
    if known:
        return code | files
    files |= Kind(frozenset({"float"})) if "int" in files.words else Kind()  # 2 stands for any number
    each = Kind(frozenset({"list"}), items=files)  # one for every stage or block
    return files | each if key.partition(".")[0] in OF_A_MODEL else files


_choosable = cache(lambda: frozenset(choosable()))


def _written(path: str) -> dict[str, Kind]:
    """The kinds of values that the files of conf/ give the keys below a place, together."""
    return _files().get(path, {})


@cache
def _files() -> dict[str, dict[str, Kind]]:
    """By place, and by key there."""
    found: dict[str, dict[str, Kind]] = {}
    for path, node in _documents():
        _collect(node, path, found)
    return found


@cache
def _below_zero() -> frozenset[str]:
    """The keys that a file of conf/ gives a number below zero."""
    found: set[str] = set()

    def look(node: dict[str, Any], path: str) -> None:
        for name, value in node.items():
            key = f"{path}.{name}" if path else str(name)
            if isinstance(value, dict):
                look(value, key)
            elif any(number < 0 for number in _numbers(value)):
                found.add(key)

    for path, node in _documents():
        look(node, path)
    return frozenset(found)


@cache
def _documents() -> list[tuple[str, dict[str, Any]]]:
    """The files of conf/, each with the place that it is read to."""
    loader, found = getattr(yaml, "CSafeLoader", yaml.SafeLoader), []
    for file in CONF.rglob("*.yaml"):
        folder = file.parent.relative_to(CONF).parts
        if folder[:1] in (("model",), ("local",), ("probe",), ("hydra",)):
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        try:
            node = yaml.load(text, loader)
        except yaml.YAMLError:  # Hydra says it where the file is chosen
            continue
        if isinstance(node, dict):
            node.pop("defaults", None)
            found.append(("" if re.match(r"(#.*\n|\s)*# @package _global_", text) else ".".join(folder), node))
    return found


def _collect(node: dict[str, Any], path: str, found: dict[str, dict[str, Kind]]) -> None:
    here = found.setdefault(path, {})
    for name, value in node.items():
        here[name] = here.get(name, Kind()) | _kind(value)
        if isinstance(value, dict):
            _collect(value, f"{path}.{name}" if path else str(name), found)


def _kind(value: Any) -> Kind:
    """Of a value in a file; what is computed may be anything."""
    if isinstance(value, str) and ("${" in value or value == "???"):
        return ANY
    if isinstance(value, dict) and "_target_" in value:
        return Kind(frozenset({"dict", "none"}))  # a part can be left out
    if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value):
        return Kind(frozenset({"float", "str"}))  # 1e-3, which is text to YAML and a number to Hydra
    words = {type(None): "none", bool: "bool", int: "int", float: "float", list: "list", dict: "dict"}
    return Kind(frozenset({words.get(type(value), "str")}))  # a date is text to Hydra


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, list):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _check_number(key: str, number: int | float, value: Any) -> None:
    low, high = RANGES.get(key, (None, LARGEST))
    if low is None and not _signed(key) and (type(number) is int or key.partition(".")[0] not in OF_A_MODEL):
        low = 0
    if number > high or (low is not None and number < low) or number < -LARGEST:
        least = f"at least {low}" if low is not None and number < low else f"at most {high:g}"
        _refuse(key, least, value)


def _signed(key: str) -> bool:
    """What may be below zero: nobody knows it of a callback that is not in conf/, and of a source of one's own."""
    place, _, name = key.rpartition(".")
    unknown = place not in _files() if key.startswith("callbacks.") else name not in OF_SOURCES
    return key in SIGNED or key in _below_zero() or (unknown and key.startswith(("callbacks.", "data.source.")))


def _refuse(key: str, what: str, value: Any) -> None:
    who, _, name = key.rpartition(".")
    said = f"{who}: {name} must be" if who else f"{key}: must be"
    raise UserError(f"{said} {what}, got {value!r}; set {key}")
