"""What is said when memory runs out: what was asked for, and the settings that keep the images of a step."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from conf.errors import UserError
from models.runs.memory import advice, explained, shortage

pytestmark = pytest.mark.case(44)
CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.02 GiB is "
    "free. Process 1 has 78.13 GiB memory in use."
)
CPU = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
CONFIG = {
    "data": {"batch_size": 64, "workers": 4},
    "task": {"gradient_checkpointing": False},
    "trainer": {"precision": "32-true"},
    "global_batch": None,
}


def trainer(accumulated=1, step=7):
    return SimpleNamespace(accumulate_grad_batches=accumulated, global_step=step)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA),
        RuntimeError(f"{CPU}8000000000 bytes. Error code 12"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_errors_of_memory_are_known(error):
    assert shortage(error) is error
    other = RuntimeError("a step failed")
    other.__cause__ = error
    assert shortage(other) is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: Resource temporarily unavailable"),
        RuntimeError("out of resource: shared memory, Required: 300000"),
        ValueError("out of memory"),
        RuntimeError("shapes differ"),
        None,
    ],
)
def test_other_errors_are_left_alone(error):
    assert shortage(error) is None


def test_the_batch_that_was_tried_and_three_settings_are_named():
    said = advice(torch.OutOfMemoryError(CUDA), CONFIG, trainer(), True)
    assert said == (
        "memory: step 8 ran out of it with data.batch_size=64 (2.5 GiB were asked for, 1.02 GiB of 79.15 GiB were "
        "free); any of these keeps the images of a step: data.batch_size=32 trainer.accumulate_grad_batches=2 | "
        "task.gradient_checkpointing=true (slower by a third) | trainer.precision=bf16-mixed"
    )


@pytest.mark.parametrize(
    ("changes", "accumulated", "first"),
    [
        ({"data": {"batch_size": 25}}, 1, "data.batch_size=5 trainer.accumulate_grad_batches=5"),
        ({"data": {"batch_size": 6}}, 2, "data.batch_size=3 trainer.accumulate_grad_batches=4"),
        ({"global_batch": 128}, 2, "data.batch_size=32 (global_batch=128 makes up for it)"),
        ({"data": {"batch_size": 1}}, 1, "task.gradient_checkpointing=true"),
    ],
)
def test_the_images_of_a_step_stay(changes, accumulated, first):
    said = advice(MemoryError(), CONFIG | changes, trainer(accumulated), True)
    assert said.partition("keeps the images of a step: ")[2].startswith(first)


def test_what_is_used_already_is_not_offered():
    used = {"data": {"batch_size": 1}, "task": {"gradient_checkpointing": True}, "trainer": {"precision": "16-mixed"}}
    assert advice(MemoryError(), CONFIG | used, trainer(), True).endswith("a smaller model or image_size")


def test_an_evaluation_may_have_smaller_batches(tmp_path):
    said = advice(RuntimeError(f"{CPU}8589934592 bytes."), CONFIG, None, False)
    assert "the evaluation ran out of it with data.batch_size=64 (8.0 GiB were asked for, " in said
    assert "this gives the same figures: data.batch_size=32 | trainer.precision=bf16-mixed" in said


def test_a_loader_process_is_named():
    said = advice(MemoryError("Caught MemoryError in DataLoader worker process 0."), CONFIG, trainer(), True)
    assert said.startswith("memory: a loader process ran out of it") and "set data.workers=1 in place of 4" in said


def test_frames_let_go_of_what_they_hold():
    """So that the next run of a sweep has the memory."""
    held = []

    def step():
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise MemoryError

    with pytest.raises(UserError, match="memory: step 8 ran out of it"), explained(CONFIG, trainer()):
        step()
    assert held[0]() is None


def test_errors_of_users_pass():
    with pytest.raises(UserError, match="out of memory, but mine"), explained(CONFIG, trainer()):
        raise UserError("out of memory, but mine")
    with pytest.raises(RuntimeError, match="shapes"), explained(CONFIG, trainer()):
        raise RuntimeError("shapes")
