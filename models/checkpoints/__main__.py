"""Renames the weights in a file: an authors' to ours (convert), ours to the authors' (export).

    python -m models.checkpoints convert biformer_tiny_best.pth --model biformer_tiny -o biformer_tiny.safetensors
    python -m models.checkpoints export outputs/mine/checkpoints/best --ema --model biformer_tiny -o theirs.pth

Exit status 2 and one sentence where that cannot be done; then no output file exists.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf import apart, output
from conf.errors import UserError
from conf.folders import escaped

if TYPE_CHECKING:  # `--help` and a wrong argument do not wait for torch
    from torch import Tensor

_OUTPUTS = {"convert": (".safetensors",), "export": (".pth", ".safetensors")}
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def main(arguments: list[str] | None = None) -> int:
    """Writes the file and says what it holds; 2 where nothing was written."""
    chosen = _parser().parse_args(arguments)
    try:
        _check(chosen)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            apart.load_timm()
            lines = _run(chosen)
    except (ValueError, TypeError, OSError, LookupError, AttributeError) as error:
        print(escaped(f"models.checkpoints: {' '.join(str(error).split())}"), file=sys.stderr)
        return 2
    for warning in caught:
        print(escaped(f"warning: {warning.message}"), file=sys.stderr)
    print(escaped("\n".join(lines), keep="\n"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.checkpoints", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (
        ("convert", "weights under the authors' names, or timm's → ours, as .safetensors"),
        ("export", "our weights → the names of the model's authors, as .pth or .safetensors"),
    ):
        sub = commands.add_parser(command, help=text, description=text)
        sub.add_argument("file", metavar="FILE", help="a file of weights, or a checkpoint directory of a run")
        sub.add_argument("--model", required=True, metavar="NAME", help="whose weights they are, e.g. biformer_tiny")
        sub.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="the file to write; a new one")
        sub.add_argument("--ema", action="store_true", help="the averaged weights instead of the raw ones")
    return parser


def _check(chosen: argparse.Namespace) -> None:
    """What can be known to be wrong before a file is read.

    Raises:
        ValueError: the model is unknown, or the output file exists or cannot be made.
    """
    from conf.names import nearest
    from models import list_models

    out, endings = chosen.output, _OUTPUTS[chosen.command]
    if chosen.model not in list_models():
        raise UserError(
            f"--model: must be one of {', '.join(list_models())}, got {chosen.model!r}"
            f"{nearest(chosen.model, list_models())}"
        )
    if out.suffix not in endings:
        raise UserError(f"--output: must end in {' or '.join(endings)}, got {out}; rename it")
    if out.exists() or out.is_symlink():
        raise UserError(f"--output: must be a new file, got {out}, which exists; remove it first")
    if not out.parent.is_dir():
        raise UserError(f"--output: must lie in a folder that exists, got {out}; make {out.parent} first")


def _run(chosen: argparse.Namespace) -> list[str]:
    """Loads, renames and writes; the lines that say what was done."""
    from models.checkpoints.conversion import convert, export, source_of
    from models.checkpoints.fitting import classes_of
    from models.checkpoints.folding import folded
    from models.checkpoints.weights import load_weights

    given, settings = load_weights(chosen.file, ema=chosen.ema), _settings(chosen)
    notes = []
    if any(settings.get(key) is not None for key in ("reparam", "adapter")):
        given, notes = folded(given, chosen.model, settings), ["reparametrised weights were folded into plain ones"]
        settings = {key: value for key, value in settings.items() if key not in ("reparam", "adapter")}
    state = (convert if chosen.command == "convert" else export)(given, chosen.model, **settings)
    before, after = (source_of(weights, chosen.model, **settings) for weights in (given, state))
    classes = classes_of(state) or classes_of(given)
    pyramid = any(name.startswith("norms.") for name in state) or not any("norm" in name for name in state)
    kind = f"{classes} classes" if classes else "pyramid, no classifier" if pyramid else "no classifier"
    millions = sum(value.numel() for name, value in state.items() if not name.endswith(_BUFFERS)) / 1e6
    _write(state, chosen)
    written = f"{chosen.model}: {len(state)} tensors, {millions:.1f} M parameters, {kind}, names of {before} → {after}"
    setting = f"num_classes={classes}" if classes else "features_only=True"
    load = f'create_model("{chosen.model}", {setting}).load_state_dict(load_weights("{chosen.output}"))'
    hints = [f"load it: {load}"] if chosen.command == "convert" else []
    return [*notes, f"{written}, written: {chosen.output}", *hints]


def _settings(chosen: argparse.Namespace) -> dict[str, Any]:
    """How the model of a run differs from the one of its name; of a file of weights nothing is known.

    Raises:
        ValueError: the run trained another model.
    """
    from models.checkpoints.conversion import settings_of
    from models.checkpoints.format.config import check_stored
    from models.checkpoints.format.directory import read_config

    if Path(chosen.file).is_file():
        return {}
    config = read_config(chosen.file)
    check_stored(config)
    if not {"run", "model", "attention"} <= config.keys():  # a directory that no run wrote
        return {}
    if (name := config["run"]["model"]) != chosen.model:
        raise UserError(f"--model: the run trained {name}, got {chosen.model}; give --model {name}")
    return settings_of(config)


def _write(state: dict[str, Tensor], chosen: argparse.Namespace) -> None:
    """The file, whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    from models.checkpoints.write import write_weights

    try:
        write_weights(chosen.output, state, {"model": chosen.model, "source": Path(chosen.file).name})
    except OSError as error:
        text = f"--output: cannot be written, got {chosen.output}: {error}; make room, or write elsewhere"
        raise OSError(text) from error


if __name__ == "__main__":
    with output.kept():
        sys.exit(main())
