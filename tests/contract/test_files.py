"""What CONTRIBUTING.md expects of a new YAML or Python file: every file has it, and one that lacks it is told which."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from conf import families
from conf.names import PARTS, options
from tests.conf.test_families import ROWS, without_a_small_row

ROOT = Path(__file__).parents[2]
PAPER = r"arXiv:\d{4}\.\d{4,5}"
TASKS, DATA = options("task"), options("data")
MECHANISM, PART, FAMILY, KERNEL = (
    "a module that `conf/attention/` names",
    "a module that `conf/attention/<part>/` names, but for layouts",
    "a module that `conf/model/` names",
    "`kernels/<op>/`",
)


class Rule(NamedTuple):
    """What files of one kind must have; `wrong` is the name and content of a file that lacks it."""

    kind: str
    sentence: str
    holds: Callable[[Path], bool]
    wrong: tuple[str, str]

    def files(self) -> list[Path]:
        """The files that it is about."""
        if self.kind in (MECHANISM, FAMILY):
            return targets(*(("attention", "attention") if self.kind == MECHANISM else ("model", "backbones")))
        if self.kind == PART:
            return [path for part in PARTS if part != "layout" for path in targets(f"attention/{part}", "attention")]
        if self.kind == KERNEL:
            return [path.parent for path in sorted(ROOT.glob("kernels/*/cases.py"))]
        return [path for pattern in re.findall(r"`([^`]+)`", self.kind) for path in sorted(ROOT.glob(pattern))]


def targets(group: str, room: str) -> list[Path]:
    """Modules of a folder of models/ that a file of a group of conf/ has as `_target_`."""
    text = "".join(path.read_text() for path in (ROOT / "conf" / group).glob("*.yaml"))
    modules = set(re.findall(rf"_target_: models\.{room}\.([\w.]+)\.\w+", text))
    return [ROOT / "models" / room / f"{module.replace('.', '/')}.py" for module in sorted(modules)]


def comment(path: Path) -> str:
    """The comment at the top of a YAML file, without Hydra's header."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines += [] if line.startswith("# @") else [line.lstrip("# ")]
    return " ".join(lines)


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text()) or {}


def is_mechanism(path: Path) -> bool:
    """It names its target and is partial, or starts from another mechanism, or lists one per stage."""
    node = read(path)
    own = str(node.get("_target_", "")).startswith("models.attention.") and node.get("_partial_") is True
    return own or "attention" in node or any(name != "_self_" for name in node.get("defaults", []))


def has_backend(path: Path) -> bool:
    node = read(path)
    return node.get("backend") == "auto" or "_target_" not in node


def has_counted_rows(path: Path) -> bool:
    if path.stem in families.files():  # no table: any model of timm
        return True
    rows = read(path).get("models", {}).values()
    return bool(rows) and all("size" in row and set(row["counted"]) == {"parameters", "multiply_adds"} for row in rows)


def is_named_as_it_fits(path: Path) -> bool:
    fitting = {f"{model}_{task}_{data}" for model in options("model") for task in TASKS for data in DATA}
    return path.stem in fitting and read(path).get("run", {}).get("fit") == path.stem


def has_a_source(path: Path) -> bool:
    return re.search(rf"Source:.*{PAPER}", docstring(path), re.DOTALL) is not None


def has_a_test(path: Path) -> bool:
    """A test in the mirrored folder, or one below it, that has its name, or imports it."""
    module = path.with_suffix("").as_posix().partition("/models/")[2].replace("/", ".")
    tests = list((ROOT / "tests/models" / module.split(".")[0]).rglob("test_*.py"))
    imported = f"from models.{module} import"
    return any(t.name == f"test_{path.name}" or imported in t.read_text() for t in tests)


def is_whole(folder: Path) -> bool:
    names = ("__init__.py", "register.py", "triton.py", "cases.py")
    tested = (ROOT / "tests/kernels" / f"test_{folder.name}.py").exists()
    return tested and all((folder / name).exists() for name in names)


def has_a_target(path: Path) -> bool:
    target = read(path).get("target", {})
    published = path.parent.name not in ("_bases", "recipes")  # what stands beside the papers states no result
    return not published or {"paper", "metric", "value", "status"} <= set(target)


RULES = [
    Rule(
        "`conf/*/**/*.yaml`",
        "begins with a comment that says in a sentence what it is, or what is chosen by it",
        lambda path: len(comment(path).split()) >= 3 and "." in comment(path),
        ("x.yaml", "# @package _global_\nseed: 1\n"),
    ),
    Rule(
        "`conf/attention/*.yaml`",
        "says in that comment, behind `Cost:`, what it costs in tokens; then `No class token.` where it takes none",
        lambda path: re.search(r"Cost: \w+ ", comment(path)) is not None or "attention" in read(path),
        ("x.yaml", "# Attention. It is cheap.\n_target_: x\n"),
    ),
    Rule(
        "`conf/attention/*.yaml`",
        "has `_target_` in `models.attention` and `_partial_: true`, or starts from another in `defaults`",
        is_mechanism,
        ("x.yaml", "# X. Cost: linear in tokens.\n_target_: models.attention.agent.agent_attention\n"),
    ),
    Rule(
        "`conf/attention/*.yaml`",
        "has the option `backend: auto`, which every mechanism takes: auto, triton or torch",
        has_backend,
        ("x.yaml", "# X. Cost: linear in tokens.\n_target_: models.attention.conv.conv\n_partial_: true\n"),
    ),
    Rule(
        "`conf/model/*.yaml`",
        "names its `family` as the file is called, and its `paper` as `arXiv:` and the number",
        lambda path: (
            path.stem in families.files()  # no table: any model of timm
            or (read(path).get("family") == path.stem and bool(re.fullmatch(PAPER, read(path).get("paper", ""))))
        ),
        ("x.yaml", "# X.\nfamily: y\npaper: arXiv:2111.11418\n"),
    ),
    Rule(
        "`conf/model/*.yaml`",
        "has in every row `size`, and `counted` as `python -m models.tables --count <name>` prints it",
        has_counted_rows,
        ("x.yaml", "models:\n  x_tiny: {size: tiny, counted: {parameters: 1}}\n"),
    ),
    Rule(
        "`conf/data/*.yaml`",
        "shows in its comment a command that uses it, `python train.py data=<name>`",
        lambda path: re.search(rf"python train\.py [^\n]*data={path.stem}\b", path.read_text()) is not None,
        ("x.yaml", "# Images of x.\n_target_: data.module.ImageData\n"),
    ),
    Rule(
        "`conf/fit/*.yaml`",
        "is called `<model>_<task>_<data>` by names that exist, and says its own name in `run.fit`",
        is_named_as_it_fits,
        ("dit_s_2_generation_digits.yaml", "# Fits.\nrun: {fit: other}\n"),
    ),
    Rule(
        "`conf/*.py` `data/**/*.py` `kernels/**/*.py` `models/**/*.py`",
        "begins with a docstring whose first sentence says what the file is for",
        lambda path: len(docstring(path).split()) >= 3,
        ("x.py", "import torch\n"),
    ),
    Rule(
        MECHANISM,
        "says in its docstring `Source:` with the number on arXiv, and `Shapes:`",
        lambda path: has_a_source(path) and "Shapes:" in docstring(path),
        ("x.py", '"""Attention.\n\nSource: a paper, 2023.\n"""\n'),
    ),
    Rule(
        MECHANISM,
        "has a test of the paper's property in `tests/models/attention/`, which imports it",
        has_a_test,
        ("nobody.py", '"""Attention."""\n'),
    ),
    Rule(
        PART,
        "has in its docstring `Source:` with the arXiv number, and `Shapes:`, and a test in `tests/models/attention/`",
        lambda path: has_a_source(path) and "Shapes:" in docstring(path) and has_a_test(path),
        ("nobody.py", '"""A part.\n\nSource: a paper, arXiv:2106.14881.\n"""\n'),
    ),
    Rule(
        FAMILY,
        "says in its docstring `Source:` with the number on arXiv, and has a test in `tests/models/backbones/`",
        lambda path: has_a_source(path) and has_a_test(path),
        ("nobody.py", '"""A backbone.\n\nSource: a paper, arXiv:2106.14881.\n"""\n'),
    ),
    Rule(
        KERNEL,
        "has `__init__.py`, `register.py`, `triton.py` and `cases.py`, and a test `tests/kernels/test_<op>.py`",
        is_whole,
        ("nothing", ""),
    ),
    Rule(
        "`recipes/**/*.yaml`",
        "states under `target` the paper, metric, value and status of the result that it must give",
        has_a_target,
        ("x.yaml", "# X.\ntarget: {paper: arXiv:2111.11418}\n"),
    ),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.sentence[:40])
def test_every_file_has_what_is_expected(rule):
    files = rule.files()
    lacking = [str(path.relative_to(ROOT)) for path in files if not rule.holds(path)]
    assert files and not lacking, "\n".join(f"{path}: {rule.sentence}" for path in lacking)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.sentence[:40])
def test_a_file_that_lacks_it_is_found(rule, tmp_path):
    path = tmp_path / rule.wrong[0]
    path.write_text(rule.wrong[1])
    assert not rule.holds(path)


def test_contributing_has_these_sentences():
    """And no other in its table; that of a backbone without a small row is tests/conf/test_families.py's."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("| file | what is expected |\n|---|---|\n")[2]
    rows = text.partition("\n\n")[0].splitlines()
    assert rows[:-1] == [f"| {rule.kind} | {rule.sentence} |" for rule in RULES]
    lacking = {name: row for name, row in ROWS.items() if name != "biformer_32px"}
    (sentence,) = without_a_small_row(lacking)
    assert sentence.partition(": ")[2].replace("biformer", "<family>") in rows[-1].replace("`", "")


@pytest.mark.parametrize("name", ["conf/attention/agent.yaml", "conf/model/swin.yaml", "models/attention/agent.py"])
def test_every_kind_is_looked_at(name):
    assert sum(ROOT / name in rule.files() for rule in RULES) >= 3
