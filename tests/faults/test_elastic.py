"""A run that is stopped on some processes goes on on others: the same images in every step, and the same weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.programs import TINY, digests, run

STOPPED = 75
# drop path and mixup draw for each batch; plain SGD, since Adam's first steps follow the sign of rounding errors
EXACT = (
    *("optimizer=sgd", "optimizer.lr=0.01", "schedule.warmup_epochs=0", "model.drop_path=0.2", "augment.mixup=0.8"),
    *("callbacks.routing=null", "data.workers=0", "trainer.limit_val_batches=1", "trainer.max_epochs=2"),
)


def stop_in(batch):
    """Source that sends SIGTERM to the first process in its training batch of this number, from 1."""
    return (
        "import os, signal\nfrom models.tasks.classification import Classification as task\n"
        "plain, seen = task.training_step, []\n"
        "def step(self, batch, index):\n    seen.append(1)\n"
        f"    if len(seen) == {batch}: os.kill(os.getpid(), signal.SIGTERM)\n    return plain(self, batch, index)\n"
        "task.training_step = step"
    )


def go(folder, name, *arguments, stop=None):
    return run(folder, *TINY, *EXACT, f"run.name={name}", *arguments, before=stop_in(stop) if stop else "")


def same(folder, one, other, exact=False):
    """Both runs ended with the same weights and averages; whether to the bit."""
    for name in ("model", "ema"):
        left, right = (load_file(folder / f"outputs/{run}/checkpoints/last/{name}.safetensors") for run in (one, other))
        for key, value in left.items():
            torch.testing.assert_close(right[key], value, atol=1e-6, rtol=1e-5, msg=f"{name} {key}")
    equal = digests(folder / "outputs" / one) == digests(folder / "outputs" / other)
    assert equal or not exact
    return equal


def steps(folder, name):
    return json.loads((folder / f"outputs/{name}/checkpoints/last/manifest.json").read_text())["step"]


@pytest.mark.full
@pytest.mark.case(25)
def test_another_batch_makes_up_the_same_steps(tmp_path):
    """32 images per step: 16 x 2 accumulated goes on as 8 x 4 in the middle of an epoch; what cannot be is refused."""
    quiet = ("augment=none", "augment.mixup=0", "model.drop_path=0", "trainer.max_epochs=1")
    layout = ("data.batch_size=16", "trainer.accumulate_grad_batches=2")
    assert go(tmp_path, "whole", *layout, *quiet)[0] == 0
    status, out = go(tmp_path, "parts", *layout, *quiet, stop=3)
    assert (status, steps(tmp_path, "parts")) == (STOPPED, 2), out
    for change, text in (
        (
            ("data.batch_size=12",),
            "32 images per optimizer step, which batches of 12 on 1 process cannot make; take",
        ),
        (("data.batch_size=16", "global_batch=48"), "with 32 images per optimizer step, got global_batch=48; leave"),
        (("data.batch_size=16", "trainer.accumulate_grad_batches=4"), "per optimizer step, got 16 x 1 x 4 = 64; leave"),
    ):
        status, out = go(tmp_path, "parts", *quiet, *change)
        assert status == 2 and text in out and "Traceback" not in out, out
    status, out = go(tmp_path, "parts", *quiet, "data.batch_size=8")
    assert status == 0 and "began as 16 x 1 x 2 (batch x processes x accumulated), goes on as 8 x 1 x 4" in out, out
    assert steps(tmp_path, "parts") == steps(tmp_path, "whole") == 4
    same(tmp_path, "whole", "parts")


@pytest.mark.full
@pytest.mark.case(8)
def test_an_exception_within_an_accumulated_step_loses_no_batch_of_it(tmp_path):
    """Steps of four batches; the third of the second step raises: the run goes on with the first of that step."""
    settings = ("data.batch_size=8", "trainer.accumulate_grad_batches=4", "trainer.max_epochs=1")
    assert go(tmp_path, "whole", *settings)[0] == 0
    broken = stop_in(7).replace("os.kill(os.getpid(), signal.SIGTERM)", "raise RuntimeError('broken')")
    assert run(tmp_path, *TINY, *EXACT, "run.name=parts", *settings, before=broken)[0] == 1
    assert steps(tmp_path, "parts") == 1
    status, out = go(tmp_path, "parts", *settings)
    assert status == 0, out
    same(tmp_path, "whole", "parts", exact=True)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.case(25)
def test_from_two_processes_to_one_and_back(tmp_path):
    """32 images per step as 16 x 2 processes; then one process accumulates two batches; then two processes again."""
    two, one = ("trainer=ddp_cpu", "data.batch_size=16"), ("trainer=cpu", "data.batch_size=16")
    assert go(tmp_path, "whole", *two)[0] == 0
    status, out = go(tmp_path, "parts", *two, stop=2)
    assert (status, steps(tmp_path, "parts")) == (STOPPED, 2), out
    status, out = go(tmp_path, "parts", *one, stop=5)
    assert (status, steps(tmp_path, "parts")) == (STOPPED, 5), out
    assert "began as 16 x 2 x 1 (batch x processes x accumulated), goes on as 16 x 1 x 2" in out
    status, out = go(tmp_path, "parts", *two)
    assert status == 0 and "began as" not in out, out
    assert steps(tmp_path, "parts") == steps(tmp_path, "whole") == 8
    print("bit for bit:", same(tmp_path, "whole", "parts"))


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.case(25)
def test_from_one_process_to_two(tmp_path):
    """16 x 2 accumulated becomes 16 x 2 processes; and without accumulation 16 becomes 8 x 2 processes by itself."""
    one, two = ("trainer=cpu", "data.batch_size=16"), ("trainer=ddp_cpu", "data.batch_size=16")
    plain = ("augment=none", "augment.mixup=0", "model.drop_path=0")
    for name, settings, step in (("a", ("trainer.accumulate_grad_batches=2",), 3), ("b", plain, 3)):
        assert go(tmp_path, f"{name}-whole", *one, *settings)[0] == 0
        status, out = go(tmp_path, name, *one, *settings, stop=5 if name == "a" else 3)
        assert (status, steps(tmp_path, name)) == (STOPPED, step), out
        status, out = go(tmp_path, name, *two, *settings)
        assert status == 0 and f"goes on as {16 if name == 'a' else 8} x 2 x 1" in out, out
        print("bit for bit:", same(tmp_path, f"{name}-whole", name))
