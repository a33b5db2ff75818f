"""The page docs/reference/kernels.md: what is predicted of the kernels, from their code."""

from pathlib import Path
from statistics import mean

from kernels.evidence.chips import BANDWIDTH_REACHED, CHIPS
from kernels.evidence.gates import faults_of
from kernels.evidence.report import Read, Row

FILE = Path(__file__).parents[2] / "docs" / "reference" / "kernels.md"
PAGE = """# Kernels, from their machine code

Written by `python -m kernels.compile --models --write`; nothing here was measured on a GPU. The launches of whole
steps are recorded on fake tensors, with every grid and every size, compiled with Triton {version} for sm_90, and their
machine code is read: registers, loops, what each loop has. Loops are as long as the numbers of a launch say; where a
length is in memory, as `kernels/evidence/assumed.py` says.

**Predicted** is the larger of two floors. Memory: each argument once, at the bandwidth that copying reaches (H100 3.0
TB/s, H200 4.3 TB/s), over 0.85. Issue: all instructions of all warps, four per clock on each of 132 multiprocessors at
1.755 GHz, over 0.65. Barriers, latency where few warps are there, and the half rate of integers are not in it, so that
it is rather too low than too high. One model, launch by launch: `python -m kernels.compile --models davit_base`.

## Steps

Milliseconds of our kernels in a step. Glue is what PyTorch runs beside products and the optimizer: norms, GELU,
residuals, sums of biases, copies.

{steps}

## Kernels

Over the launches in these steps, of which so many differ. Blocks are programs that fit on a multiprocessor, idle
barriers those in loops without a matrix product; the cap is the share of an H100's bandwidth that is left at full
issue.

{kernels}

## Known faults

The gates of `tests/kernels/test_evidence.py` fail for these. `tests/kernels/known_faults.json` lists them, and may
only shrink.

{faults}
"""


def write(reads: list[Read]) -> None:
    """Writes it anew, from steps that were read for sm_90."""
    FILE.write_text(markdown(reads))


def markdown(reads: list[Read]) -> str:
    import triton

    parts = {"steps": summary(reads), "kernels": kernels_table(reads), "faults": faults_table(reads)}
    return PAGE.format(version=triton.__version__, **{name: "\n".join(lines) for name, lines in parts.items()})


def faults_table(reads: list[Read]) -> list[str]:
    """Markdown: a line per gate."""
    lines = ["| gate | kernels, with the worst number |", "|---|---|"]
    for gate, of in faults_of(reads).items():
        named = ", ".join(f"`{key.partition(' ')[2]}` {worst}" for key, worst in of.items())
        lines.append(f"| {gate} | {named or 'none'} |")
    return lines


def summary(reads: list[Read]) -> list[str]:
    """Markdown: a line per step with what is predicted of it."""
    lines = [
        "| step | launches | variants | H100 ms | H200 ms | most of it (H100 ms) | glue, at 0.85 of an H100's memory |",
        "|---|--:|--:|--:|--:|---|---|",
    ]
    for found in reads:
        most = sorted(found.milliseconds.items(), key=lambda item: -item[1]["H100"])[:4]
        size, kernels = found.outside.get("glue", (0.0, 0))
        glue = size * 1e9 / CHIPS["H100"].bandwidth / BANDWIDTH_REACHED * 1e3
        lines.append(
            f"| {found.name} | {found.launches} | {found.variants} | "
            f"{found.total('H100'):.1f} | {found.total('H200'):.1f} | "
            + ", ".join(f"`{name}` {of['H100']:.1f}" for name, of in most)
            + f" | {size:.1f} GB in {kernels} kernels, {glue:.0f} ms |"
        )
    return lines


def kernels_table(reads: list[Read]) -> list[str]:
    """Markdown: a line per kernel, over all steps: the worst of its variants."""
    rows: dict[str, list[Row]] = {}
    for found in reads:
        for row in found.rows:
            rows.setdefault(f"{row.operation} {row.kernel}", []).append(row)
    lines = [
        "| kernel | differ | registers | blocks | spilled B | shared KB | cores | load B | narrow loads | "
        "idle barriers | cap | share predicted |",
        "|---|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for name, of in sorted(rows.items()):
        caps = [row.chips["H100"]["cap"] for row in of]
        shares = [row.chips["H100"]["share"] for row in of]
        lines.append(
            f"| `{name}` | {len(of)} | {_span([r.registers for r in of])} | {_span([r.blocks for r in of])} | "
            f"{max(r.spilled for r in of)} | {max(r.shared for r in of) / 1024:.0f} | {of[0].tensor_cores} | "
            f"{mean(r.load_bytes for r in of):.0f} | {max(r.narrow_loads for r in of)} | "
            f"{max(r.idle_barriers for r in of)} | {_percent(caps)} | {_percent(shares)} |"
        )
    return lines


def _span(values: list[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}–{max(values)}"


def _percent(values: list[float]) -> str:
    low, high = f"{min(values):.0%}", f"{max(values):.0%}"
    return low if low == high else f"{low[:-1]}–{high}"
