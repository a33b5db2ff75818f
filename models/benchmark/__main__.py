"""Times our models against timm's of the same architecture: forward and training step, in pairs, in one process.

    python -m models.benchmark --against timm
    python -m models.benchmark --against timm --model swin_tiny,davit_tiny --step forward --batch 1 --json

float32, on a GPU where there is one. The ratio is theirs ÷ ours of each pair: above 1 ours is faster. A training step
is forward, cross entropy and backward. Exit status 2 and one sentence where it cannot be done.
"""

import argparse
import json
import sys

import timm
import torch
from rich.console import Console
from rich.table import Table

from conf import output
from conf.errors import UserError
from conf.folders import escaped
from conf.names import nearest
from kernels.bench.environment import environment
from models.benchmark.pairs import STEPS, Pair, compare
from models.benchmark.partners import TIMM, USUAL


def main(arguments: list[str] | None = None) -> int:
    """Prints a table, or JSON; 2 where a model is not known."""
    chosen = _parser().parse_args(arguments)
    try:
        names = checked_names(chosen.model)
        rows, where = _measured(names, chosen)
    except UserError as error:
        print(escaped(f"models.benchmark: {error}"), file=sys.stderr)
        return 2
    if chosen.json:
        print(json.dumps({"environment": where, "rows": [row._asdict() for row in rows]}, indent=1))
    else:
        _show(rows, where)
    return 0


def checked_names(names: str) -> list[str]:
    """The models in a list with commas; one of each family where it is empty.

    Raises:
        UserError: timm has no such model.
    """
    found = [name for name in names.split(",") if name] or list(USUAL)
    if wrong := [name for name in found if name not in TIMM]:
        raise UserError(
            f"--model: timm has no such model, got {', '.join(wrong)}{nearest(wrong[0], TIMM)}; choose from "
            f"{', '.join(TIMM)}"
        )
    return found


def _measured(names: list[str], chosen: argparse.Namespace) -> tuple[list[Pair], dict[str, str]]:
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = STEPS if chosen.step is None else (chosen.step,)
    rows = []
    for name in names:
        print(escaped(f"{name} and timm's {TIMM[name]}"), file=sys.stderr, flush=True)
        rows += compare(name, TIMM[name], steps, chosen.batch, chosen.pairs, device)
    where = environment() | {"timm": timm.__version__, "threads": str(torch.get_num_threads())}
    return rows, where


def _show(rows: list[Pair], where: dict[str, str]) -> None:
    said = [where["device"], *(f"{key} {where[key]}" for key in ("threads", "torch", "timm"))]
    table = Table(pad_edge=False, box=None, header_style="bold", caption=", ".join(said), caption_justify="left")
    for head in ("model", "step", "batch", "pixels", "ours ms", "timm ms", "timm ÷ ours", "80 % of pairs above, below"):
        table.add_column(head, justify="left" if head in ("model", "step") else "right")
    for row in rows:
        times = f"{row.ours_ms:,.1f}", f"{row.timm_ms:,.1f}"
        spread = f"{row.low:.2f}, {row.high:.2f}"
        table.add_row(row.model, row.step, str(row.batch), str(row.image_size), *times, f"{row.ratio:.2f}", spread)
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.benchmark", description=__doc__.partition("\n")[0])
    parser.add_argument("--against", choices=["timm"], default="timm", help="whose models")
    parser.add_argument("--model", default="", metavar="NAMES", help=f"with commas; {','.join(USUAL)} without it")
    parser.add_argument("--step", choices=STEPS, help="both without it")
    parser.add_argument("--batch", type=_count, default=4, help="images per step; 4")
    parser.add_argument("--threads", type=_count, help="of PyTorch on the CPU; as many as it takes without it")
    parser.add_argument("--pairs", type=_count, default=7, help="steps of each that count; 7")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


if __name__ == "__main__":
    with output.kept():
        sys.exit(main())
