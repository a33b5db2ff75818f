"""What has to be installed: Python, the packages and their versions, and what one option alone needs."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import conf
from conf import extras

ROOT = Path(__file__).parents[1]
FILES = ("requirements.txt", "requirements-extra.txt", "requirements-dev.txt")


def lines(name: str) -> list[str]:
    stripped = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in stripped if line and not line.startswith("-r ")]


def python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("line", [line for name in FILES for line in lines(name)])
def test_constraints_admit_what_the_bounds_do(line):
    """One lower bound, which `make test-lowest` installs, one upper bound, and an exact version between them."""
    requirement = Requirement(line)
    assert sorted(s.operator for s in requirement.specifier if s.operator != "!=") == ["<", ">="]
    pins = {Requirement(pin).name.lower(): Requirement(pin).specifier for pin in lines("constraints.txt")}
    (pin,) = pins[requirement.name.lower()]
    assert pin.operator == "==" and requirement.specifier.contains(pin.version)


def test_constraints_hold_for_every_build_of_torch():
    assert not [pin for pin in lines("constraints.txt") if pin.startswith(("nvidia-", "cuda-", "pip=="))]


def test_python_is_stated_once_more_in_words():
    stated = "{}.{}".format(*conf.OLDEST_PYTHON)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={stated}" and f"Python ≥ {stated}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_an_older_python_is_one_sentence(program):
    for file in (program, "conf/__init__.py"):  # what is parsed and run before the sentence
        ast.parse((ROOT / file).read_text(), feature_version=(3, 7))
    modules = "sys.modules |= dict.fromkeys(('hydra', 'omegaconf', 'torch'))"  # nothing is installed there
    old = f"import runpy, sys; sys.version_info = (3, 10, 13, 'final', 0); {modules}"
    done = python(f"{old}; runpy.run_path({program!r}, run_name='__main__')")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("Python must be 3.11 or newer, got 3.10.13 (") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("package", "argument"), [("tensorboard", "logger=tensorboard"), ("diffusers", "task.autoencoder=/folder")]
)
def test_a_missing_extra_is_one_sentence(package, argument, command, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    task = ["task=generation"] if "autoencoder" in argument else []
    status, output, errors = command("train", argument, *task)
    assert status == 2 and output == ""
    assert errors == (
        f"train.py: {argument} needs the package {package}, which is not installed; "
        f"run: python -m pip install '{extras.requirement(package)}'\n"
    )


def test_a_missing_extra_is_said_before_torch_is_imported(tmp_path):
    code = "import runpy, sys; sys.modules |= {{'torch': None, 'tensorboard': None}}; sys.argv = [{0!r}, {1!r}]"
    program = str(ROOT / "train.py")
    run = f"runpy.run_path({program!r}, run_name='__main__')"
    done = python(f"{code.format(program, 'logger=tensorboard')}; {run}", tmp_path)
    assert done.returncode == 2 and "needs the package tensorboard" in done.stderr, done.stderr


SOURCES = [path for room in ("conf", "data", "kernels", "models", "recipes") for path in (ROOT / room).glob("**/*.py")]
PACKAGES = [Requirement(line).name for line in lines("requirements-extra.txt")]


def imported(node: ast.AST) -> set[str]:
    """Packages that importing a module imports: what stands in functions waits until they are called."""
    names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
    names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    inner = [] if isinstance(node, ast.FunctionDef) else ast.iter_child_nodes(node)
    return {name.partition(".")[0] for name in names}.union(*map(imported, inner))


def test_no_file_imports_an_extra_before_it_is_asked_for():
    assert imported(ast.parse("if 1:\n import a.b\ndef f():\n import c")) == {"a"}
    assert [path for path in SOURCES if imported(ast.parse(path.read_text())).intersection(PACKAGES)] == []


@pytest.mark.full
def test_everything_can_be_imported_without_the_extras():
    paths = (path.relative_to(ROOT).with_suffix("") for path in SOURCES if path.name != "__main__.py")
    modules = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    absent = f"import importlib, sys; sys.modules |= dict.fromkeys({PACKAGES})"
    done = python(f"{absent}; list(map(importlib.import_module, {modules}))")
    assert done.returncode == 0, done.stderr
