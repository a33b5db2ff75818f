"""Shared by all tests: the command line in this process, in a folder of its own."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
os.environ.setdefault("WANDB_MODE", "disabled")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`command("train", "attention=agent") -> (exit status, output, errors)`, run in `tmp_path`."""

    def run(program: str, *arguments: str) -> tuple[int, str, str]:
        from conf import cli

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(ROOT / f"{program}.py"), *arguments])
        monkeypatch.delenv("VISION_ZOO_RUN_NAME", raising=False)
        module = {}
        exec(compile((ROOT / f"{program}.py").read_text(), f"{program}.py", "exec"), module)
        before = cli.take_config_from_checkpoint if program == "eval" else None
        try:
            cli.run(program, module["main"], before=before)
            status = 0
        except SystemExit as exit:
            status = exit.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
