"""Ahead-of-time compilation: what it records, what it prints, and that the kernels fit on the chips."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kernels
from kernels import compile
from kernels.launches import Resources

ROOT = Path(__file__).parents[2]


def compiled(*arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own: in this one the kernels may be interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "kernels.compile", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


# small kernels, one with the matrix unit, one that fills a multiprocessor; the rest takes a minute and a half
TYPICAL = ("depthwise_conv", "window_attention", "channel_attention")
REST = pytest.param(sorted(set(kernels.OPERATIONS) - set(TYPICAL)), marks=pytest.mark.full, id="the rest")


@pytest.mark.parametrize("modules", [pytest.param(TYPICAL, id="typical"), REST])
def test_kernels_compile_to_what_was_recorded(modules):
    """For sm_80 and sm_90; with a Triton that is not the recorded one, within what every chip has."""
    done = compiled(*modules, "--quick")
    rows = done.stdout.splitlines()[1:]
    assert len(rows) >= 4 * len(modules) and {row.split()[2] for row in rows} == {"sm_80", "sm_90"}
    print("\n".join(row for row in rows if "<-" in row))
    assert done.returncode == 0, f"if this is meant: python -m kernels.compile --record\n{done.stderr}"


def row(registers=100, spilled=0, shared=1024) -> compile.Row:
    return compile.Row("op", "_kernel", 1, "sm_80", "stage 1", Resources(registers, spilled, shared, "mma"))


@pytest.mark.parametrize(
    ("found", "version", "expected"),
    [
        (row(), "pinned", ("", False)),
        (row(101), "pinned", ("recorded: 100 0 1024 mma, with Triton pinned", True)),
        (row(spilled=8), "pinned", ("recorded: 100 0 1024 mma, with Triton pinned", True)),
        (row()._replace(place=2), "pinned", ("not recorded, with Triton pinned", True)),
        (row(255, 256, 99 * 1024), "another", ("recorded: 100 0 1024 mma, with Triton pinned", False)),
        (row(256), "another", ("does not fit", True)),
        (row(spilled=260), "another", ("does not fit", True)),
        (row(shared=99 * 1024 + 1), "another", ("does not fit", True)),
    ],
)
def test_the_recorded_compiler_must_agree_and_others_must_fit(found, version, expected, monkeypatch):
    table = {"triton": "pinned", "rows": {row().key: [100, 0, 1024, "mma"]}}
    monkeypatch.setattr("triton.__version__", version)
    assert compile.problem_of(found, table) == expected
    assert compile.problem_of(found, None)[1] == ("fit" in expected[0])


def test_a_record_keeps_other_operations_of_the_same_triton_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(compile, "RECORDED", tmp_path / "compiled.json")
    one, two, gone = (row()._replace(operation=name) for name in ("window_attention", "moh_attention", "no_more"))
    monkeypatch.setattr("triton.__version__", "1")
    compile.record([gone, two], ["no_more", "moh_attention"])
    compile.record([one], ["window_attention"])
    assert set(json.loads(compile.RECORDED.read_text())["rows"]) == {one.key, two.key}
    monkeypatch.setattr("triton.__version__", "2")
    compile.record([one], ["window_attention"])
    assert json.loads(compile.RECORDED.read_text()) == {
        "triton": "2",
        "columns": ["registers", "spilled", "shared", "tensor_cores"],
        "rows": {one.key: [100, 0, 1024, "mma"]},
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["no_such_operation"], "no operation is called no_such_operation; choose from agent_attention"),
        (["--target", "h200"], "--target must be like sm_90, got h200"),
        (["--record", "--dtype", "float32"], "--record is for sm_80 and sm_90 in bfloat16, got another"),
    ],
)
def test_wrong_names_are_one_error(line, message, capsys):
    with pytest.raises(SystemExit) as exit:
        compile.arguments_of(line)
    assert exit.value.code == 2 and message in capsys.readouterr().err
