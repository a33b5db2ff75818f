"""The README and docs/, read: commands compose, options and files exist, links lead somewhere, nothing is out of place.

What they tell to type is run in test_commands.py.
"""

import io
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from conf import recipes, text
from conf.compose import compose_run
from conf.names import options
from conf.text import literal
from models.listing import show
from tests.docs.pages import KNOWN, ROOT, Block, blocks, pages, settings, words, write_files
from tests.docs.running import LOOKING

PAGES = pages()
BLOCKS = [block for page in PAGES for block in blocks(page)]
EVAL = {"recipe", "model", "attention", "data", "task", "image_size", "samples", "seed", "probe"}
EVAL |= {*OmegaConf.load(ROOT / "conf" / "eval.yaml")} - {"defaults"}
# options that a page tells to write: files, and rows of tables
WRITTEN = {Path(name).stem for block in BLOCKS for name in block.marked("file ") if name.startswith("conf/")}
WRITTEN |= {name for block in BLOCKS for name in re.findall(r"^  (\w+): \{size:", block.text, re.MULTILINE)}
LINK = re.compile(r"!?\[[^\]]*\]\((?!https?:)([^)\s]+)\)")
PATH = re.compile(r"`((?:conf|data|docs|kernels|models|recipes|tests|\.assets)/[\w./-]+)`")


def check_command(command: str, block: Block) -> None:
    """A command can run: its program, settings, options and files exist.

    Raises:
        AssertionError: what does not exist, or a program that nobody knows.
    """
    program, *rest = words(command)
    where = f"{block.where}: {command}"
    if program in ("train.py", "eval.py"):
        program, rest = "python", [program, *rest]
    if program == "torchrun":
        return check_command(command[command.index("train.py") :], block)
    if program == "make":
        assert rest and re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), where
    elif program == "source":
        assert rest == [".venv/bin/activate"], where
    elif program == "python" and rest[0] == "-m":
        check_module(rest[1], rest[2:], where)
    elif program == "python" and rest[:2] == ["train.py", "list"]:
        show(rest[2:], Console(file=io.StringIO()))
    elif program == "python" and rest[0] == "train.py":
        if not block.marked("status ") and not set(LOOKING) & set(rest):
            check_settings(settings(rest[1:]), where)
    elif program == "python" and rest[0] == "eval.py":
        given = [word for word in settings(rest[1:]) if word not in options("probe")]
        unknown = [word for word in given if word.split("=")[0].split(".")[0].lstrip("+") not in EVAL]
        probes = {f"probe={name}" for name in options("probe")} | {*options("probe")}
        assert not unknown and (probes & set(rest) or any(word.startswith("ckpt=") for word in rest)), where
    elif program == "python":
        assert (ROOT / rest[0]).exists(), where
    else:
        raise AssertionError(f"{where}: nobody knows the program {program}")


def check_settings(given: list[str], where: str) -> None:
    """train.py composes them; folders that only a reader has are not looked into."""
    given = [word for word in given if not word.startswith(("data.root=", "init=", "hydra."))]
    if any(word.partition("=")[2] in WRITTEN for word in given):
        return  # a page says how to write it; the command is run
    try:
        composes(tuple(text.literal(given)))
    except Exception as error:
        raise AssertionError(f"{where}: {error}") from None


@cache
def composes(given: tuple[str, ...]) -> None:
    compose_run(literal(list(given)))


def check_module(name: str, given: list[str], where: str) -> None:
    """A module with a command line, every option of which stands in the sources of its package."""
    if name == "pytest":
        missing = [word for word in given if word.startswith("tests") and not (ROOT / word).exists()]
        assert not missing, where
        return
    folder = ROOT / name.replace(".", "/")
    assert (folder / "__main__.py").exists() or folder.with_suffix(".py").exists(), where
    text = "".join(path.read_text() for path in (ROOT / name.split(".")[0]).rglob("*.py"))
    assert not [word for word in given if word.startswith("--") and f'"{word}"' not in text], where


# the others' commands are composed with the full matrices, where all of them are run, too
QUICK = ("README.md", "docs/find-your-way.md", "docs/evaluate.md")


@pytest.mark.parametrize("page", [pytest.param(p, marks=[] if p in QUICK else pytest.mark.full) for p in PAGES])
def test_every_command_can_run(page):
    for block in BLOCKS:
        for command in block.commands if block.page == page and block.language == "console" else ():
            check_command(command, block)


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("python train.py trainer.max_epoch=3", "max_epoch"),
        ("python train.py attention=agnt", "agnt"),
        ("python eval.py data.root=/data", "eval.py"),
        ("python -m models.tables --coutn", "--coutn"),
        ("python -m models.table", "models.table"),
        ("make tset", "make tset"),
        ("pip install torch", "nobody knows the program pip"),
    ],
)
def test_a_command_that_cannot_run_is_found(command, text):
    with pytest.raises(AssertionError, match=re.escape(text)):
        check_command(command, Block("README.md", 1, "console", f"$ {command}\n"))


def test_every_block_is_known():
    """Commands are console with `$`, code is python; marks are spelled right, and a block that is not run says why."""
    for block in BLOCKS:
        assert block.language in ("console", "python", "yaml", "bash", ""), block.where
        assert block.language != "console" or block.commands, f"{block.where}: no line begins with $"
        assert all(mark.startswith(KNOWN) for mark in block.marks), f"{block.where}: {block.marks}"
        assert all(len(reason) > 10 for reason in block.marked("only read, ")), block.where
        if block.language == "python":
            compile(block.text, block.where, "exec")
    stray = [page for page in PAGES if (ROOT / page).read_text().count("<!-- test:") != _marks(page)]
    assert not stray, f"{stray}: a mark that stands before no block"


def _marks(page: str) -> int:
    return sum(len(block.marks) for block in BLOCKS if block.page == page)


def test_shell_scripts_train_what_exists():
    for block in BLOCKS:
        if block.language == "bash":
            for line in re.findall(r"python (?:train|eval)\.py [^\n]*", block.text):
                check_command(line, block)


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_and_paths_exist(page):
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    assert not re.findall(r"@[A-Z]+@", text), "a placeholder"
    written = {name for block in BLOCKS for name in block.marked("file ")}
    for link in LINK.findall(text):
        path, _, heading = link.partition("#")
        target = folder / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not heading or f"#{heading}" in anchors(target.read_text()), f"{page}: {link}: no such heading"
    for path in PATH.findall(text):
        known = (ROOT / path).exists() or path in written or "test_pooling" in path
        assert known, f"{page}: there is no {path}"


def anchors(text: str) -> list[str]:
    """What a Markdown page can be linked at."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return ["#" + re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_every_page_is_listed():
    listed = set(LINK.findall((ROOT / "docs/README.md").read_text()))
    found = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert found - {"README.md"} <= listed


def test_names_in_tables_of_groups_exist():
    """Options that prose names: of data in docs/train-on-my-images.md, recipes anywhere."""
    text = (ROOT / "docs/train-on-my-images.md").read_text()
    first = re.findall(r"^\| ([^|]+) \|", text.partition("| `data=` |")[2].partition("\n\n")[0], re.M)
    assert set(re.findall(r"`(\w+)`", " ".join(first))) == set(options("data"))
    named = {name for page in PAGES for name in re.findall(r"recipe=(\w+(?:/\w+)?)", (ROOT / page).read_text())}
    assert named <= set(recipes.offered()), named - set(recipes.offered())


def test_files_of_pages_are_new_or_go_on(tmp_path):
    """A block that is written where a file exists is put at its end, as the page says."""
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/swin.yaml").write_text("models:\n")
    write_files("docs/add-a-backbone.md", tmp_path)
    assert (tmp_path / "conf/model/swin.yaml").read_text().startswith("models:\n  swin_mini: ")
    assert (tmp_path / "models/backbones/funnel.py").read_text().startswith('"""Stages as Swin')
    for path in tmp_path.rglob("*.py"):
        done = subprocess.run([sys.executable, "-m", "py_compile", path], capture_output=True)
        assert done.returncode == 0, done.stderr


def test_the_code_of_pages_keeps_the_style(tmp_path):
    """Files that a reader is told to write pass the linter, where it is installed."""
    for page in PAGES:
        write_files(page, tmp_path)
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists():
        pytest.skip("ruff is not installed beside this Python; make lint has it")
    command = [ruff, "check", "--config", ROOT / "pyproject.toml", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
