"""Writes docs/reference/faults.md from the catalogue and its tests: `python tests/faults/table.py`."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.faults.cases import CASES  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "faults.md"
HEAD = """# Faults

What can happen to a run, what the program does then, and what is lost at most. Every row is produced for real by the
tests that the last column counts (`tests/faults` has most of them); `make faults` runs the long experiments: random
kills and stops, and a soak. This page is written by `python tests/faults/table.py`.

| | what happens | what the program does | lost | tests |
|--:|---|---|---|--:|
"""
_MARK = re.compile(r"mark\.case\((\d+)\)")


def counts() -> dict[int, int]:
    """How many test functions are marked with each case; a mark of a whole file counts once."""
    found = dict.fromkeys(CASES, 0)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for number in _MARK.findall(path.read_text()):
            found[int(number)] += 1
    return found


def page() -> str:
    """The whole page."""
    tests = counts()
    rows = [
        f"| {number} | {case.fault} | {case.happens}{_untested(case.untested)} | {case.lost} | {tests[number]} |"
        for number, case in CASES.items()
    ]
    return HEAD + "\n".join(rows) + "\n"


def _untested(text: str) -> str:
    return f" (no test here has {text})" if text else ""


if __name__ == "__main__":
    PAGE.write_text(page())
