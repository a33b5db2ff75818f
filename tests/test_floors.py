"""Imports go down only: a file may import from the floors below its own, and every folder has a floor."""

import ast
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("conf", "data", "kernels", "models", "recipes")
# what each floor may import of ours; a name covers the modules below it, `=name` only that module
FLOORS = {
    "kernels": [],
    "models.layers": ["kernels"],
    "models.attention": ["kernels", "models.layers", "models.attention.replacement"],
    "models.attention.replacement": ["conf.cli", "models.attention", "models.factory"],
    "models.backbones": ["=models.attention", "models.layers"],  # the contract, no mechanism by name
    "models.checkpoints": ["=models", "conf.cli"],  # what models there are, to give weights their names
    "models.probes": ["models.layers"],
    "models.diffusion": [],
    "models.tasks": [
        *("models.attention.backend", "models.attention.dense_to_moh", "models.attention.head_router"),
        *(
            "models.attention.moh",
            "models.diffusion",
            "models.checkpoints",
            "models.cost",
            "models.factory",
            "models.layers",
        ),
        *("conf.cli", "recipes"),
    ],
    "models.factory": ["conf", "=models.backbones.base"],
    "models.tables": ["conf", "=models", "=models.backbones.base", "models.cost"],
    "models.recipe_tables": ["recipes", "conf", "models.backbones.base", "models.cost", "models.factory"],
    "models.cost": [],
    "models.benchmark": ["=models", "models.cost", "models.factory"],
    "recipes.__main__": ["models.recipe_tables"],
    "models": ["conf", "models.factory"],
    "data": [],
    "recipes": [],
    "conf": ["recipes", "data.folders", "models.checkpoints", "models.tasks.report", "models.tasks.sweep"],
    "train": ["conf", "models.tasks"],
    "eval": ["conf", "models.tasks"],
}
FILES = [*(path for name in OURS for path in (ROOT / name).rglob("*.py")), ROOT / "train.py", ROOT / "eval.py"]


def floor_of(module: str) -> str:
    return next(f for f in sorted(FLOORS, key=len, reverse=True) if module == f or module.startswith(f + "."))


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            # `from models.layers import window` imports the module models.layers.window
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                path_of_name = ROOT / name.replace(".", "/")
                yield name if path_of_name.with_suffix(".py").exists() or path_of_name.is_dir() else node.module


def wrong_imports(path: Path) -> list[str]:
    here = floor_of(module_of(path))
    others = [name for name in imports_of(path) if name.split(".")[0] in OURS and floor_of(name) != here]
    return [
        f"{path.relative_to(ROOT)} imports {name}: {here} may import only {FLOORS[here]}"
        for name in others
        if not any(_allows(rule, name) for rule in FLOORS[here])
    ]


def _allows(rule: str, name: str) -> bool:
    return name == rule[1:] if rule.startswith("=") else name == rule or name.startswith(rule + ".")


def test_imports_go_down():
    assert len(FILES) > 20
    wrong = [line for path in FILES for line in wrong_imports(path)]
    assert not wrong, "\n".join(wrong)


def test_a_wrong_import_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "models" / "backbones" / "planted.py"
    file.parent.mkdir(parents=True)
    file.write_text("from models.attention import Grid\nfrom models.attention.softmax import softmax_attention\n")
    assert wrong_imports(file) == [
        "models/backbones/planted.py imports models.attention.softmax: "
        "models.backbones may import only ['=models.attention', 'models.layers']"
    ]


def test_importing_the_command_line_stays_light():
    """`--help` must be instant: nothing that it imports may import torch."""
    heavy = {"torch", "timm", "pytorch_lightning", "torchvision", "sklearn", "datasets", "wandb", "matplotlib"}
    light = ["train.py", "eval.py", "recipes/__init__.py", "data/folders.py", "data/__init__.py", "models/__init__.py"]
    for path in [*(ROOT / "conf").glob("*.py"), *(ROOT / name for name in light)]:
        top_level = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in top_level if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in top_level if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in names} & heavy, path


@pytest.mark.parametrize("name", OURS)
def test_no_installed_distribution_owns_our_names(name):
    owners = packages_distributions().get(name)
    assert not owners, f"the installed package {owners} also provides `{name}`: uninstall it, one hides the other"
