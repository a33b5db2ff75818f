"""What a command asks to be exported, judged before anything heavy is imported."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf

from conf import foreign, text, values
from conf.errors import UserError
from conf.names import CONF, choosable, nearest
from models.export.formats import FORMATS, refuse_missing

OWN = ("format", "dynamic_size", "fold_norms", "quantize", "opset", "images")
OUTPUT = ("-o", "--output")
LOWEST_OPSET = 18  # that torch's exporter writes without converting


class Wanted(NamedTuple):
    """What is exported, and where to.

    format: one of `FORMATS`. output: a new file, or a new folder. dynamic_size: leaves height and width of the images
    open. fold_norms: makes batch norms one with the products in front of them. quantize: "int8" or None. opset: of
    ONNX, None for the exporter's. images: of the validation data, that the accuracy of quantised weights is measured
    on; None for all. arguments: those that say which model and which data, as `eval.py` takes them.
    """

    format: str
    output: Path
    dynamic_size: bool
    fold_norms: bool
    quantize: str | None
    opset: int | None
    images: int | None
    arguments: list[str]


def wanted(given: Sequence[str]) -> Wanted:
    """The arguments of the command, each looked at.

    Raises:
        UserError: the first that is wrong, with what to write instead.
    """
    words, output = _taken(list(given))
    own = {key: value for key, value in words if key in OWN}
    others = [f"{key}={value}" for key, value in words if key not in OWN]
    _refuse_unknown(words)
    name = _format(own.get("format"))
    found = Wanted(
        name,
        _place(name, output),
        values.flag("export", "dynamic_size", _read(own, "dynamic_size", False), fix="set dynamic_size=true"),
        values.flag("export", "fold_norms", _read(own, "fold_norms", False), fix="set fold_norms=true"),
        _read(own, "quantize", None),
        _read(own, "opset", None),
        _count(_read(own, "images", "all")),
        others,
    )
    _refuse_misfit(found)
    refuse_missing(name)
    if not any(key == "ckpt" for key, _ in words):
        raise UserError("ckpt: no value; give a run, a checkpoint or a file of weights: ckpt=outputs/mine")
    return found


def _taken(given: list[str]) -> tuple[list[tuple[str, str]], str | None]:
    """Settings by key, in order, and the value of `-o`."""
    output, words = None, []
    while given:
        word = given.pop(0)
        key, equals, value = word.partition("=")
        if key in OUTPUT:
            if not equals and not given:
                raise UserError(f"{key}: no value; give the file to write: -o mine.onnx")
            output = value if equals else given.pop(0)
        elif not equals or word.startswith("-"):
            near = f"; write ckpt={word}" if Path(word).exists() else "; see --help"
            raise UserError(f"settings are written key=value, got {word!r}{near}")
        else:
            words.append((key, value))
    return words, output


def _refuse_unknown(words: list[tuple[str, str]]) -> None:
    """A word that is no setting of this command; what belongs to an evaluation is judged with it."""
    known = {*OmegaConf.load(CONF / "eval.yaml"), *OmegaConf.load(CONF / "train.yaml"), *choosable(), *OWN}
    for key, value in words:
        if key in foreign.EVAL["ckpt"].split() and key != "init":
            raise UserError(f"there is no setting {key!r}{foreign.advice('eval', key, value)}")
        if key.lstrip("+~").partition(".")[0].partition("/")[0] not in known:
            raise UserError(f"there is no setting {key!r}{nearest(key, [*OWN, 'ckpt', 'weights'])}; see --help")
        if key in ("probe", "input", "output", "backend", "compile", "channels_last"):
            instead = " -o" if key == "output" else ""
            raise UserError(f"{key}={value} has no effect on an export; leave it out{instead and ', give -o'}")


def _format(value: str | None) -> str:
    if value is None:
        raise UserError(f"format: no value; give one of {', '.join(FORMATS)}: format=onnx")
    if value not in FORMATS:
        raise UserError(f"format: must be one of {', '.join(FORMATS)}, got {value!r}{nearest(value, FORMATS)}")
    return value


def _place(name: str, output: str | None) -> Path:
    """Where it is written to, which is new, in a folder that is there."""
    suffixes = FORMATS[name].suffixes
    if not output:
        what, example = ("file", f"mine{suffixes[0]}") if suffixes else ("folder", "mine")
        raise UserError(f"-o: no value; give the {what} to write: -o {example}")
    path = Path(text.plain(output)).expanduser()
    if suffixes and path.suffix not in suffixes:
        raise UserError(f"-o: must end in {' or '.join(suffixes)} for format={name}, got {path}; rename it")
    if path.exists() or path.is_symlink():
        raise UserError(f"-o: must be new, got {path}, which exists; remove it first, or give another name")
    if not path.parent.is_dir():
        raise UserError(f"-o: must lie in a folder that exists, got {path}; make {path.parent} first")
    return path


def _read(own: dict[str, str], key: str, usual: Any) -> Any:
    return yaml.safe_load(own[key]) if key in own else usual


def _count(value: Any) -> int | None:
    if value == "all":
        return None
    return values.whole("export", "images", value, fix="set images=500", what="a positive number or all")


def _refuse_misfit(found: Wanted) -> None:
    """What the format cannot hold."""
    form, others = FORMATS[found.format], {name for name, form in FORMATS.items() if form.resizes}
    if found.dynamic_size and not form.resizes:
        reason = "a trace holds one size" if found.format == "torchscript" else "it holds weights, which take any size"
        raise UserError(
            f"dynamic_size: {found.format} cannot have it, as {reason}; "
            f"leave it out, or choose format={' or '.join(sorted(others))}"
        )
    if found.fold_norms and not form.graph:
        graphs = " or ".join(name for name, form in FORMATS.items() if form.graph)
        raise UserError(
            f"fold_norms: {found.format} cannot have it, as it holds the weights of the model as it is; leave it out, "
            f"or choose format={graphs}"
        )
    if found.quantize is not None:
        values.choice("export", "quantize", found.quantize, ["int8"], fix="set quantize=int8")
        if not form.quantizes:
            raise UserError(f"quantize: only format=onnx can have it, got format={found.format}; leave it out")
    if found.opset is not None:
        if found.format != "onnx":
            raise UserError(f"opset: only format=onnx has one, got format={found.format}; leave it out")
        values.whole("export", "opset", found.opset, LOWEST_OPSET, fix="leave it out for that of the exporter")
