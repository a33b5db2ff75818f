"""Imports go down only: the graph of folders has no cycle; and what a room may not know of the others.

Imports inside functions and for types count. `python tests/test_floors.py` prints the floors.
"""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("conf", "data", "kernels", "models", "recipes")
ALONE = ("models.side_outputs",)  # modules that are a room of their own
# what a folder, and those below it, may import of ours besides itself; where nothing is said: anything below it
ONLY = {
    "kernels": (),
    "conf": (),
    "data": ("conf",),
    "recipes": ("conf", "models"),
    "models.layers": ("conf", "kernels"),
    "models.attention": ("conf", "kernels", "models.layers"),
    "models.reparam": ("conf", "kernels", "models.attention", "models.layers"),
    "models.adapters": ("conf",),
    "models.initializers": ("conf", "kernels", "models.attention", "models.layers"),
    "models.pools": ("conf", "kernels", "models.attention", "models.layers"),
    "models.heads": ("conf", "kernels", "models.attention", "models.layers"),
    "models.reducers": ("conf", "kernels", "models.attention", "models.layers"),
    "models.wrappers": ("conf", "kernels", "models.attention", "models.layers"),
    "models.backbones": ("conf", "models.attention", "models.layers"),
    "models.gates": ("conf", "kernels", "models.attention", "models.layers"),
    "models.diffusion": ("conf", "models.loggers", "models.side_outputs"),
    "models.loggers": ("conf", "models.side_outputs"),
    "models.side_outputs": ("conf",),
    "models.callbacks": ("conf", "models.attention", "models.checkpoints", "models.loggers", "models.side_outputs"),
    "models.checkpoints.format": ("conf",),
    "models.checkpoints.names": ("conf",),
}


def files() -> list[Path]:
    return [*(path for name in OURS for path in (ROOT / name).rglob("*.py")), ROOT / "train.py", ROOT / "eval.py"]


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def room_of(module: str) -> str:
    """The folder of a module: `models.layers` of models.layers.tokens."""
    if module in ALONE:
        return module
    return module if (ROOT / module.replace(".", "/")).is_dir() else module.rpartition(".")[0] or module


def imports_of(path: Path) -> Iterator[str]:
    yield from _imports_in(ast.walk(ast.parse(path.read_text())))


def _imports_in(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import of {node.module}"
            # `from models.layers import window` imports the module models.layers.window
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                path_of_name = ROOT / name.replace(".", "/")
                yield name if path_of_name.with_suffix(".py").exists() or path_of_name.is_dir() else node.module


def edges() -> list[tuple[str, str, str]]:
    """(room, room that it imports from, the two modules), of every import of ours that leaves its room."""
    return edges_below(ROOT)


@cache
def edges_below(root: Path) -> list[tuple[str, str, str]]:
    """The same, of a folder that is read once."""
    found = []
    for path in files():
        here = module_of(path)
        for name in imports_of(path):
            if name.split(".")[0] in OURS and room_of(name) != room_of(here):
                found.append((room_of(here), room_of(name), f"{here} imports {name}"))
    return found


def floors() -> list[str]:
    """Every room, lower ones first.

    Raises:
        AssertionError: there is a cycle; the message has the imports that close it.
    """
    graph: dict[str, set[str]] = {}
    for here, there, _ in edges():
        graph.setdefault(here, set()).add(there)
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        cycle = error.args[1]
        text = [why for here, there, why in edges() if {here, there} <= set(cycle)]
        raise AssertionError("the folders import each other: " + "; ".join(sorted(set(text)))) from None


def forbidden() -> list[str]:
    """Every import that `ONLY` does not allow."""
    wrong = []
    for here, there, why in edges():
        rule = next((name for name in sorted(ONLY, key=len, reverse=True) if _within(here, name)), None)
        if rule is not None and not any(_within(there, name) for name in (rule, *ONLY[rule])):
            wrong.append(f"{why}: {rule} may import only {', '.join(ONLY[rule]) or 'itself'}")
    return wrong


def _within(room: str, name: str) -> bool:
    return room == name or room.startswith(f"{name}.")


def test_the_graph_of_folders_has_no_cycle():
    assert len(files()) > 100
    assert floors().index("models.attention") < floors().index("models.backbones")


def test_rooms_import_only_what_they_may():
    wrong = forbidden()
    assert not wrong, "\n".join(wrong)


def test_a_wrong_import_and_a_cycle_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    planted = {
        "train.py": "",
        "eval.py": "",
        "models/layers/grid.py": "def late():\n    from models.attention.softmax import softmax_attention\n",
        "models/attention/softmax.py": "from models.layers.grid import Grid\n",
    }
    for name, text in planted.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(AssertionError, match=r"models\.layers\.grid imports models\.attention\.softmax"):
        floors()
    assert forbidden() == [
        "models.layers.grid imports models.attention.softmax: models.layers may import only conf, kernels"
    ]


def test_a_backbone_knows_the_contract_and_no_mechanism():
    modules = {why.rpartition(" ")[2] for here, _, why in edges() if here == "models.backbones"}
    assert {name for name in modules if name.startswith("models.attention")} == {"models.attention"}


def test_only_the_contract_has_a_name_of_a_higher_floor():
    """`models.attention.replace` and `to_moh` are `models.surgery`'s, looked up when somebody asks for them."""
    late = {module_of(path) for path in files() if "import_module(" in path.read_text()}
    # the others: a file of names below, a target of a checked configuration, operations by name, models to be timed
    known = {"models.attention", "models.checkpoints.fitting", "models.checkpoints.format.config", "conf.moved"}
    assert late == known | {name for name in late if name.startswith("kernels")}


def test_importing_the_command_line_stays_light():
    """`--help` must be instant: nothing that it imports may import torch."""
    heavy = ("torch", "timm", "pytorch_lightning", "torchvision", "sklearn", "datasets", "wandb", "matplotlib")
    light = "conf.cli, conf.compose, models, data, recipes, models.runs.evaluated, models.runs.compare"
    code = f"import sys, {light}, models.runs.launchers; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def loaded_with(*modules: str) -> set[str]:
    """Every module of ours that importing these loads; imports inside functions wait until they are needed."""
    found, waiting = set(), [*modules]
    while waiting:
        name = waiting.pop()
        path = ROOT / name.replace(".", "/")
        path = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        if name in found or name.split(".")[0] not in OURS or not path.exists():
            continue
        found.add(name)
        tree = ast.parse(path.read_text())
        waiting += [name.rpartition(".")[0], *_imports_in(node for node in tree.body if not isinstance(node, ast.If))]
    return found


def test_a_classifier_imports_no_diffusion():
    loaded = loaded_with("models.runs.training", "models.runs.evaluation", "models.tasks.classification")
    assert "models.tasks.base" in loaded
    assert not [name for name in loaded if "diffusion" in name or "generation" in name]
    assert "models.diffusion" in loaded_with("models.tasks.generation")


@pytest.mark.parametrize("name", OURS)
def test_no_installed_distribution_owns_our_names(name):
    owners = packages_distributions().get(name)
    assert not owners, f"the installed package {owners} also provides `{name}`: uninstall it, one hides the other"


if __name__ == "__main__":
    print("\n".join(reversed(floors())))
