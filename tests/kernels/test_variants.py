"""What is compiled again in the middle of a run: nothing for an odd last batch, but where another schedule is meant.

Triton compiles a kernel for every combination of types, constants, and of which numbers are 1 or multiples of 16.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.launches import _is_aligned

ROOT = Path(__file__).parents[2]
# where few images and heads leave multiprocessors idle, tokens are cut into parts: other kernels, which a batch of 77
# needs in a stage or two, and one of 128 does not
PARTS = {
    "agent_attention": ["_agent_gradients", "_agent_gradients", "_combine", "_gather", "_pool"],
    "channel_attention": [*["_finish_sums"] * 2, *["_part_outputs"] * 2, *["_part_sums"] * 2],
    "window_attention": ["_backward_whole", "_forward_whole"],
}
SCRIPT = """
import json
from dataclasses import replace
import torch
import kernels
from kernels.launches import launches

def variants(operation, stages, batch):
    stages = {name: {**shape, "batch": batch} for name, shape in stages.items()}
    return set(launches(replace(operation, stages=stages), list(stages), torch.bfloat16))

found = {}
for module in kernels.OPERATIONS:
    for operation in kernels.operations_of(module):
        stages = {name: shape for name, shape in operation.stages.items() if shape["batch"] >= 64}
        new = variants(operation, stages, 77) - variants(operation, stages, 128)
        found[operation.name] = sorted(launch.kernel.__name__ for launch in new)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def new_variants() -> dict[str, list[str]]:
    """The kernels that each operation compiles for a batch of 77 after one of 128: in a process that compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.full
def test_an_odd_last_batch_is_not_compiled(new_variants):
    assert {name: new for name, new in new_variants.items() if new} == PARTS


@pytest.mark.parametrize(
    ("value", "aligned"),
    [(32, True), (33, False), (torch.empty(8), True), (torch.empty(8)[2:], False), (torch.empty(8)[4:], True)],
)
def test_a_view_is_aligned_as_its_memory_is(value, aligned):
    assert _is_aligned(value) == aligned
