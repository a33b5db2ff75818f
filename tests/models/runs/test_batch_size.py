"""`data.batch_size=auto`: the largest batch that fits, found without leaving a trace, and kept by the run."""

import json
from types import SimpleNamespace

import pytest
import torch

from models import create_model
from models.largest import CLOSE, largest
from models.runs.batch_size import Trial, rounded
from models.tasks.classification import Classification
from tests.faults.programs import TINY, run

pytestmark = pytest.mark.case(44)


@pytest.mark.parametrize("holds", [1, 2, 7, 64, 100, 1000])
@pytest.mark.parametrize("known", [1, 64])
def test_the_search_comes_close(holds, known):
    tried = []
    found = largest(lambda size: tried.append(size) or size <= holds, min(known, holds))
    assert found <= holds <= CLOSE * found + 1
    assert len(tried) <= 20


def test_the_search_has_an_end():
    assert largest(lambda size: True, 1, most=100) >= 95
    assert largest(lambda size: size <= 3, 1, most=64) == 3


@pytest.mark.parametrize(
    ("size", "images", "processes", "wanted"),
    [(100, None, 1, 64), (64, None, 2, 64), (1, None, 1, 1), (100, 96, 1, 96), (50, 96, 1, 48), (50, 96, 4, 24)],
)
def test_the_number_makes_up_the_step(size, images, processes, wanted):
    assert rounded(size, {"global_batch": images}, processes) == wanted


@pytest.mark.full
def test_a_trial_leaves_no_trace():
    model = create_model("vit_32px", num_classes=4, dim=16, depth=1, num_heads=2, patch_size=8)
    task = Classification(model, {"opt": "adamw", "lr": 1e-3, "reference_batch": 512}, {}, 4)
    data = SimpleNamespace(
        **{"image_size": 32, "channels": 3, "num_classes": 4, "augment": SimpleNamespace(mixes=True)},
        source=SimpleNamespace(train=SimpleNamespace(labels=torch.zeros(8))),
    )
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        callbacks=[],
        precision_plugin=SimpleNamespace(forward_context=torch.enable_grad),
    )
    before, random = {k: v.clone() for k, v in task.state_dict().items()}, torch.get_rng_state()
    with Trial(trainer, task, data) as trial:
        assert trial.fits(4)
        trial.batch = lambda size, number: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
        assert not trial.fits(8)
        trial.batch = lambda size, number: 1 / 0
        with pytest.raises(ZeroDivisionError):
            trial.fits(8)
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in task.parameters()) and "log" not in vars(task)


@pytest.mark.full
def test_a_run_keeps_its_number(tmp_path):
    tiny = [setting for setting in TINY if "max_epochs" not in setting]
    status, text = run(tmp_path, "run.name=a", *tiny, "trainer.max_epochs=1", "data.batch_size=auto", "global_batch=48")
    assert status == 0, text
    assert "data.batch_size=auto: 48, on a CPU" in text
    stored = json.loads((tmp_path / "outputs/a/checkpoints/last/config.json").read_text())
    assert stored["data"]["batch_size"] == 48
    more = ("data.batch_size=auto", "global_batch=48", "trainer.max_epochs=2")
    status, text = run(tmp_path, "run.name=a", *tiny, *more)
    assert status == 0 and "batch 48 on 1 process" in text and "continues from" in text, text
    status, text = run(tmp_path, "run.name=b", *tiny, "data.batch_size=most")
    assert status == 2 and "batch_size must be" in text
