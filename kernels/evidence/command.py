"""`python -m kernels.compile --models …`: the launches of whole steps, compiled and read, on any machine."""

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path

from kernels.evidence import gates, page
from kernels.evidence.chips import MULTIPROCESSORS
from kernels.evidence.report import Read, as_dict, read, text
from kernels.evidence.steps import KINDS, Model, record

MODELS = (
    "biformer_base", "davit_base", "agent_swin_base", "flatten_swin_base", "inline_swin_base", "moh_transnext_small_75",
)  # fmt: skip
LARGE = ("biformer_base@512", "davit_base@512", "agent_swin_base_384", "flatten_swin_base_384")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("whole models, instead of operations")
    group.add_argument(
        "--models", nargs="*", metavar="NAME", type=_model,
        help="names of conf/model, also name@pixels or name@pixelsxbatch; without any the six of the tables, and four "
        "at 384 and 512 px. 128 images, 32 of more than 256 px",
    )  # fmt: skip
    group.add_argument("--step", choices=KINDS, help="only this; training and inference without it")
    group.add_argument("--json", type=Path, metavar="FILE", help="everything, as data")
    group.add_argument("--caps", action="store_true", help="kernels/bench/caps.json anew, for the operations")
    group.add_argument("--write", action="store_true", help="docs/reference/kernels.md anew, for sm_90")


def main(chosen: argparse.Namespace) -> int:
    """Prints what was found; 1 if a gate fails that is not known to."""
    import triton

    models = chosen.models or [Model.named(name) for name in (*MODELS, *LARGE)]
    reads = []
    for one in _reads(models, [chosen.step] if chosen.step else KINDS, chosen.target or ["sm_90"]):
        print("\n".join(text(one)), flush=True)
        reads.append(one)
    if chosen.json:
        chosen.json.write_text(json.dumps([as_dict(one) for one in reads], indent=1) + "\n")
    if chosen.write:
        page.write([one for one in reads if one.target == "sm_90"])
    found = gates.record(reads, triton.__version__) if chosen.record else gates.problems(reads, triton.__version__)
    recorded = [line for line in found if not line.endswith("not recorded")]
    print("\n".join(["", *found] if found else ["", "as recorded, and no fault that is not known"]))
    return int(bool(recorded))


def check_names(models: list[Model], targets: Iterable[str]) -> None:
    """Refuses what does not exist, before a model is built.

    Raises:
        ValueError: a model that conf/model does not have, or a target of which nothing is known.
    """
    known = import_module("models").list_models()
    for model in models:
        if model.name not in known:
            names = ", ".join(known)
            raise ValueError(f"--models: there is no model of this name, got {model.name}; choose from {names}")
    for target in targets:
        if target not in MULTIPROCESSORS:
            names = ", ".join(MULTIPROCESSORS)
            raise ValueError(f"--target: nothing is known of this multiprocessor, got {target}; choose from {names}")


def _reads(models: list[Model], kinds: list[str] | tuple[str, ...], targets: list[str]) -> Iterator[Read]:
    for model in models:
        for kind in kinds:
            step = record(model, kind)
            yield from (read(step, target) for target in targets)


def _model(text: str) -> Model:
    if not re.fullmatch(r"[a-z0-9_]+(@\d+(x\d+)?)?", text):
        raise argparse.ArgumentTypeError(f"must be like davit_base, davit_base@512 or davit_base@512x32, got {text}")
    return Model.named(text)
