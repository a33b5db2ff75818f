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


@pytest.fixture
def copy(tmp_path):
    """The checkout with the files that pages tell to write, and no run in it."""
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, tmp_path)
    for page in PAGES:
        write_files(page, tmp_path)
    return tmp_path


@pytest.mark.full
@pytest.mark.slow
def test_every_command_of_every_page_runs(copy):
    """One test, since pages share a process: it ends with what went wrong in each."""
    variables = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(copy)}
    command = [sys.executable, str(ROOT / "tests/docs/pages.py"), *PAGES]
    done = subprocess.run(command, cwd=copy, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    assert [page for page in PAGES if f"{page}: done in " not in done.stdout] == []
