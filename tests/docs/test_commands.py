"""Every command and every piece of code of the README and docs/ is run, on a copy of the checkout, with small settings.

All pages run in one process, one after the other; what a page tells to write is written into the copy before it starts.
"""

import os
import shutil
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT, pages, write_files

PAGES = [page for page in pages() if not page.startswith("docs/reference/")]
COPIED = ("conf", "data", "kernels", "models", "recipes", "docs")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The checkout with the files that pages tell to write, and no run in it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    for page in PAGES:
        write_files(page, folder)
    return folder


@pytest.fixture(scope="module")
def said(copy):
    """What running all pages printed, by page: `done`, or what went wrong."""
    variables = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(copy)}
    command = [sys.executable, str(ROOT / "tests/docs/pages.py"), *PAGES]
    done = subprocess.run(command, cwd=copy, env=os.environ | variables, capture_output=True, text=True)
    found, page = {}, ""
    for line in done.stdout.splitlines():
        page = next((name for name in PAGES if line.startswith(f"{name}: ")), page)
        found[page] = found.get(page, "") + line + "\n"
    assert page, done.stderr
    return found


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs(said, page):
    assert said.get(page, "not reached") == f"{page}: done\n", said.get(page)
