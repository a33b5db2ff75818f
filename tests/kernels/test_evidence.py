"""What is read from machine code: instructions, loops, how long they are, what fits; and the gates on real steps."""

import json
import os
import re
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from kernels import compile
from kernels.evidence import chips, code, command, gates, machine_code, roof, trips
from kernels.evidence.report import Read, Row
from kernels.evidence.steps import Model

ROOT = Path(__file__).parents[2]

# as nvdisasm writes it: a loop of two instructions in a loop, the inner one from a function that was inlined
LISTING = """
.text._kernel:
	//## File "/somewhere/kernels/op/triton.py", line 10
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.U16 R7, desc[UR18][R2.64] ;
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_0:
	//## File "/somewhere/kernels/device/conv.py", line 32 inlined at "/somewhere/kernels/op/triton.py", line 12
	//## File "/somewhere/kernels/op/triton.py", line 12
        /*0030*/                   FFMA R1, R2, R3, R4 ;
        /*0040*/              @!P3 BRA `(.L_x_0) ;
	//## File "/somewhere/kernels/op/triton.py", line 11
        /*0050*/               @P3 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);
"""
INNER = (("kernels/device/conv.py", 32), ("kernels/op/triton.py", 12))

# as Triton writes it: `for a in range(0, 10, 3)`, in it `for b in range(first, n)`; the first programs do nothing else
IR = """
#loc = loc("/somewhere/kernels/op/triton.py":10:1)
#loc1 = loc("/somewhere/kernels/op/triton.py":11:4)
#loc2 = loc("/somewhere/kernels/device/conv.py":32:4)
#loc3 = loc("/somewhere/kernels/op/triton.py":12:4)
#loc4 = loc(callsite(#loc2 at #loc3))
#loc5 = loc("named"(#loc1))
module {
  tt.func public @_kernel(%x: !tt.ptr<f32> loc("x"(#loc)), %n: i32 loc("n"(#loc))) attributes {noinline = false} {
    %c0 = arith.constant 0 : i32 loc(#loc)
    %c10 = arith.constant 10 : i32 loc(#loc)
    %c3 = arith.constant 3 : i32 loc(#loc)
    %c1 = arith.constant 1 : i32 loc(#loc)
    %pid = tt.get_program_id x : i32 loc(#loc)
    %first = arith.remsi %pid, %c3 : i32 loc(#loc)
    %some = arith.cmpi sge, %pid, %c3 : i32 loc(#loc)
    scf.if %some {
      %sum.1:2 = scf.for %a = %c0 to %c10 step %c3 iter_args(%b.0 = %c0, %b.1 = %c0) -> (i32, i32)  : i32 {
        %more = scf.for %d.0 = %first to %n step %c1 iter_args(%e = %b.0) -> (i32)  : i32 {
          scf.yield %e : i32 loc(#loc2)
        } loc(#loc4)
        scf.yield %more, %b.1 : i32, i32 loc(#loc1)
      } loc(#loc5)
    } loc(#loc)
    %length = tt.load %x : !tt.ptr<i32> loc(#loc)
    scf.for %f = %c0 to %length step %c3  : i32 {
    } loc(#loc3)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""


def test_instructions_have_their_places_and_branches_backwards_are_loops():
    found = machine_code.parsed(LISTING)
    assert [i.address for i in found] == list(range(0, 0x80, 0x10))
    outer, inner = machine_code.loops_of(found)
    assert (outer.first, outer.last, inner.first, inner.last) == (0x10, 0x50, 0x30, 0x40)
    assert [i.name for i in outer.own] == ["LDG.E.U16", "BAR.SYNC.DEFER_BLOCKING", "BRA"]
    assert inner.own[-1].where == INNER and outer.own[-1].where == (("kernels/op/triton.py", 11),)
    assert machine_code.mix(outer.all) == {"load": 1, "barrier": 1, "float": 1, "other": 2}


@pytest.mark.parametrize(("name", "bytes"), [("LDG.E.U16", 2), ("LDG.E.U8", 1), ("LDG.E", 4), ("LDG.E.128", 16)])
def test_a_load_moves_as_much_as_its_name_says(name, bytes):
    assert machine_code.width(machine_code.Instruction(0, name, "", (), None)) == bytes


def elf(info: bytes) -> bytes:
    """A file with two sections, the names and the attributes, whose headers come last."""
    names = b"\0.names\0.nv.info\0"
    at = 64 + len(names) + len(info)
    head = bytearray(64)
    struct.pack_into("<Q", head, 40, at)
    struct.pack_into("<HHH", head, 58, 64, 2, 0)
    sections = [(1, 64, len(names)), (8, 64 + len(names), len(info))]
    table = b"".join(struct.pack("<IIQQQQ24x", name, 0, 0, 0, start, size) for name, start, size in sections)
    return bytes(head) + names + info + table


def test_registers_and_stack_are_attributes_of_the_file():
    sized, other = struct.Struct("<BBHII"), struct.pack("<BBH", 3, 0x2F, 7)
    info = other + sized.pack(4, 0x2F, 8, 14, 128) + sized.pack(4, 0x11, 8, 14, 40) + sized.pack(4, 0x12, 8, 14, 99)
    assert machine_code.resources_of(elf(info)) == (128, 40)
    with pytest.raises(ValueError, match=r"a cubin must have a section \.nv\.info, got 2 others"):
        machine_code.resources_of(elf(info).replace(b".nv.info", b".nv.none"))


def test_loops_are_as_long_as_their_numbers_say_in_the_mean_of_all_programs():
    found = trips.trips_of(IR, {"n": 5}, (6,), lambda: 30.0)
    outer, inner, unknown = (("kernels/op/triton.py", 11),), INNER, (("kernels/op/triton.py", 12),)
    # half of the programs, 4 times, and inside from 0, 1 or 2 to 5
    assert found.loops == {outer: 0.5 * 4, inner: 0.5 * 4 * 4, unknown: 10.0}
    assert found.unknown == {unknown}
    assert found.lines[(("kernels/op/triton.py", 10),)] == 1.0


def test_only_some_programs_of_a_large_grid_are_worked_out():
    found = trips.trips_of(IR, {"n": 5}, (30000, 2), lambda: 0.0)
    assert found.loops[(("kernels/op/triton.py", 11),)] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "expected"),
    [
        ("sm_90", 65, 16, 0, 1), ("sm_90", 64, 16, 0, 2), ("sm_90", 96, 4, 0, 5), ("sm_90", 32, 4, 100 * 1024, 2),
        ("sm_80", 32, 4, 100 * 1024, 1), ("sm_86", 32, 4, 100 * 1024, 0), ("sm_86", 16, 1, 0, 16),
    ],
)  # fmt: skip
def test_as_many_programs_fit_as_registers_warps_and_shared_memory_allow(target, registers, warps, shared, expected):
    assert chips.blocks(target, registers, warps, shared) == expected


def code_with(*loops: code.Loop, straight: dict | None = None) -> code.Code:
    return code.Code(64, 0, 0, 8, "-", (16,), 0, loops, Counter(straight or {}), IR)


def loop(where=INNER, instructions=100, unrolled=1, remainder=False, barriers=0, products=0) -> code.Loop:
    return code.Loop(where, instructions, barriers, products, unrolled, remainder)


def test_instructions_are_counted_as_often_as_they_run():
    places = {(("kernels/op/triton.py", 10),): 20, ((("kernels/op/triton.py", 11),)): 7, (): 3}
    found = trips.Trips({INNER: 11.0}, {(("kernels/op/triton.py", 10),): 0.5}, frozenset())
    assert roof.executed(code_with(loop(), straight=places), found) == 0.5 * 20 + 7 + 3 + 11 * 100
    parts = loop(instructions=380, unrolled=4), loop(remainder=True)
    assert roof.executed(code_with(*parts), found) == 2 * 380 + 3 * 100


def test_of_two_loops_of_a_place_the_larger_is_unrolled():
    def machine(first: int, loads: int) -> machine_code.Loop:
        body = tuple(machine_code.Instruction(first + i, "LDG.E.128", "", INNER, None) for i in range(loads))
        return machine_code.Loop(first, first + loads, body, body)

    large, small = code._loops([machine(0, 8), machine(100, 2)], {INNER})
    assert (large.unrolled, large.remainder, small.unrolled, small.remainder) == (4, False, 1, True)


def test_the_prediction_is_the_larger_floor_over_what_is_reached():
    chip = chips.Chip("sm_90", 100, 1e9, 1e12)
    of_memory = roof.floors_of_work(10**9, 1000, 1000.0, False, chip)
    assert of_memory.predicted == pytest.approx(1e-3 / 0.85) and of_memory.share == pytest.approx(0.85)
    of_issue = roof.floors_of_work(10**9, 10**6, 800.0, False, chip)
    assert of_issue.predicted == pytest.approx(2e-3 / 0.65) and of_issue.cap == pytest.approx(0.5)


# Gates

ROW = Row(
    "op", "_kernel", 3, 4, (8,), {}, 64, 8, 0, 1024, "mma", 16.0, 0, 0, [(100, 0)], 1.0, False,
    {"H100": {"predicted us": 10.0}},
)  # fmt: skip

STEP = "net 224 px, batch 2, training, sm_90"


def read_with(**changes) -> Read:
    row = replace(ROW, **changes)
    return Read("net 224 px, batch 2, training", "sm_90", row.times, 1, {}, {}, [row])


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """Gates whose files are empty; holds what was recorded first."""
    monkeypatch.setattr(gates, "RECORDED", tmp_path / "steps.json")
    monkeypatch.setattr(gates, "KNOWN", tmp_path / "known_faults.json")
    assert gates.record([read_with(idle_barriers=6, spilled=40)], "pinned") == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"idle_barriers": 5}, [
            "sm_90 op _kernel: idle barriers: in loops without a product: 5, listed as 6; lower it with --record"
        ]),
        ({"idle_barriers": 7}, ["sm_90 op _kernel: idle barriers: in loops without a product: 7, at most 6"]),
        ({"spilled": 44}, ["sm_90 op _kernel: spilled bytes: 44, at most 40"]),
        ({"narrow_loads": 1}, ["sm_90 op _kernel: narrow loads: of 16-bit tiles, 1 or 2 bytes each: 1, at most 0"]),
        ({"shared": 99 * 1024 + 4}, ["sm_90 op _kernel: shared memory above 99 KB: 4, at most 0"]),
        ({"blocks": 7}, [f"{STEP}: kernels: {{'op _kernel': [3, 7]}}, recorded: {{'op _kernel': [3, 8]}}"]),
        ({"times": 4}, [
            f"{STEP}: launches: 4, recorded: 3",
            f"{STEP}: kernels: {{'op _kernel': [4, 8]}}, recorded: {{'op _kernel': [3, 8]}}",
        ]),
    ],
)  # fmt: skip
def test_nothing_becomes_worse_than_is_recorded(changes, expected, recorded):
    more = {"idle_barriers": 6, "spilled": 40} | changes
    assert gates.problems([read_with(**more)], "pinned") == expected


def test_another_triton_must_keep_launches_and_what_every_chip_has(recorded):
    assert gates.problems([read_with(blocks=2, idle_barriers=9, spilled=200)], "another") == []
    assert gates.problems([read_with(spilled=300)], "another") == ["sm_90 op _kernel: spilled bytes: 300, at most 256"]
    assert len(gates.problems([read_with(times=4)], "another")) == 1
    elsewhere = replace(read_with(idle_barriers=9, spilled=200), target="sm_120")
    assert gates.problems([elsewhere], "pinned") == [f"{elsewhere.name}, sm_120: not recorded"]


def test_the_list_of_faults_only_shrinks(recorded):
    idle, spilled = "idle barriers: in loops without a product", "spilled bytes"
    other = replace(read_with(), name="another net")
    assert gates.record([other], "pinned") == []  # not all steps: nothing is lowered
    assert json.loads(gates.KNOWN.read_text())[spilled] == {"sm_90 op _kernel": 40}
    worse = gates.record([read_with(idle_barriers=7), other], "pinned")
    assert worse == [f"sm_90 op _kernel: {idle}: 7, at most 6"]
    known = json.loads(gates.KNOWN.read_text())
    assert known[idle] == {"sm_90 op _kernel": 6} and known[spilled] == {}


# The command line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--models", "no_such_net"], "there is no model of this name, got no_such_net; choose from"),
        (["--models", "davit_base@big"], "must be like davit_base, davit_base@512 or davit_base@512x32, got davit"),
        (["--models", "davit_base", "--target", "sm_70"], "nothing is known of this multiprocessor, got sm_70; choose"),
        (["--models", "davit_base", "--quick"], "--models takes no operations, --quick or --dtype"),
    ],
)  # fmt: skip
def test_wrong_models_are_one_error(line, message, capsys):
    with pytest.raises(SystemExit) as exit:
        compile.arguments_of(line)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_a_model_is_named_with_its_size_and_its_batch():
    assert Model.named("davit_base@512x32") == Model("davit_base", 512, 32)
    assert Model.named("davit_base") == Model("davit_base", 0, 0)


def compiled(*arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own: in this one the kernels may be interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.compile", "--models", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_step_is_as_recorded():
    """Of a model whose kernels come from three operations."""
    done = compiled("davit_base", "--step", "inference", "--target", "sm_90")
    assert "davit_base 224 px, batch 128, inference, sm_90: 72 launches" in done.stdout, done.stderr
    assert done.returncode == 0 and "not recorded" not in done.stdout, done.stdout[-3000:]


def steps() -> list[str]:
    """Models of which a training step is recorded at 224 pixels; the other recorded steps launch much the same."""
    named = re.compile(r"(\w+) 224 px, batch (\d+), training, sm_\d+")
    found = (named.fullmatch(key) for key in json.loads(gates.RECORDED.read_text())["steps"])
    return list(dict.fromkeys(f"{step[1]}@224x{step[2]}" for step in found if step))


@pytest.mark.full
@pytest.mark.parametrize("model", steps())
def test_steps_are_as_recorded(model):
    """If a change is meant: python -m kernels.compile --models --target sm_80 --target sm_90 --record --write."""
    done = compiled(model, "--step", "training", "--target", "sm_80", "--target", "sm_90")
    assert "sm_90: " in done.stdout, done.stderr
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.full
def test_kernels_fit_on_chips_with_less_shared_memory():
    done = compiled(*command.MODELS, "--step", "training", "--target", "sm_120")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
