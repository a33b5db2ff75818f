"""ρ of soft masks falls as in the authors' code, in the model and its average, and goes on exactly after a stop."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from models import create_model
from models.attention import Grid, Site
from models.attention.factors.soft_mask import soft_mask
from models.attention.softmax import softmax_attention
from models.callbacks.preemption import Stopped
from models.callbacks.soft_masking import SoftMasking
from tests.models.callbacks import tiny_run

GRID = Grid(2, 3)


class Masked(nn.Module):
    """Six numbers as the cells of a map, attention in raster order, two logits."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(1, 8), nn.Linear(8, 2)
        self.attn = softmax_attention(Site(8, 2, GRID, 0, 0, 1, "vit"), factor=soft_mask)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(self.up(x[..., None]), GRID).x.mean(1))


class Seen(pl.Callback):
    """ρ of the model and of its average in every batch and validation."""

    def __init__(self) -> None:
        self.rho: list[float] = []
        self.validated: list[float] = []

    def on_train_batch_end(self, trainer, task, *given) -> None:
        assert task.model.attn.core.factor.rho == task.ema_model.attn.core.factor.rho
        self.rho.append(float(task.model.attn.core.factor.rho))

    def on_validation_end(self, trainer, task) -> None:
        self.validated.append(float(task.model.attn.core.factor.rho))


class Task(tiny_run.Task):
    def __init__(self, *given) -> None:
        super().__init__(*given)
        torch.manual_seed(0)
        self.model = Masked()


@pytest.fixture
def masked(monkeypatch):
    monkeypatch.setattr(tiny_run, "Task", Task)


@pytest.mark.parametrize("shape", ["constant", "linear"])
def test_the_schedule_is_that_of_the_authors(shape):
    first, whole = 25 * 7, 300 * 7
    early = np.full(first, 1.0) if shape == "constant" else np.linspace(1.0, 0.0, first)
    schedule = SoftMasking(25, shape)
    found = [schedule.rho(step, first, 0.0) for step in range(whole)]
    assert found == pytest.approx([*early, *[0.0] * (whole - first)], abs=1e-12)


def test_rho_falls_with_the_steps_of_the_optimizer(masked, tmp_path):
    """Two batches of eight accumulate: four steps an epoch, six of which are on the line."""
    seen = Seen()
    given = (SoftMasking(1.5, "linear", start=0.5), seen)
    tiny_run.fit(tmp_path, callbacks=given, accumulate_grad_batches=2)
    steps = [0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0]
    assert seen.rho == pytest.approx([rho for rho in steps for _ in range(2)], abs=1e-6)
    assert seen.validated == pytest.approx([0.2, 0.0], abs=1e-6)


@pytest.mark.parametrize("shape", ["constant", "linear"])
def test_a_stopped_run_goes_on_exactly_and_files_hold_no_rho(masked, tmp_path, shape):
    whole = tiny_run.fingerprint(*tiny_run.fit(tmp_path / "whole", callbacks=(SoftMasking(1.5, shape),)))
    without = tiny_run.fingerprint(*tiny_run.fit(tmp_path / "without"))
    with pytest.raises(Stopped):
        tiny_run.fit(tmp_path / "stopped", callbacks=(SoftMasking(1.5, shape),), signals={"0.4": "SIGTERM"})
    seen = Seen()
    again = tiny_run.fit(tmp_path / "stopped", resume="auto", callbacks=(SoftMasking(1.5, shape), seen))
    found = tiny_run.fingerprint(*again)
    assert seen.rho[0] > 0 and seen.rho[-1] == 0
    assert all(torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value)) for key, value in whole.items())
    assert not torch.equal(whole["model.up.weight"], without["model.up.weight"])
    assert not [key for key in whole if "rho" in key]


def test_a_model_without_soft_masks_is_refused(tmp_path):
    text = r"soft_mask: no mechanism of the model has a soft mask, got callbacks.soft_mask; choose attention=causal or"
    with pytest.raises(ValueError, match=text):
        tiny_run.fit(tmp_path, callbacks=(SoftMasking(),))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": -1}, "soft_mask: epochs must be a number of at least 0, got -1; set callbacks.soft_mask.epochs"),
        ({"shape": "cosine"}, "soft_mask: shape must be constant or linear, got 'cosine'; set callbacks.soft_mask.sh"),
        ({"start": 2}, "soft_mask: start must be a number between 0 and 1, got 2; set callbacks.soft_mask.start"),
    ],
)
def test_wrong_options_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        SoftMasking(**options)


def test_a_change_of_rho_compiles_nothing_again():
    torch.manual_seed(0)
    model, x, graphs = create_model("illama_32px", num_classes=4, dim=16, depth=1, num_heads=2), [], []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    compiled, images = torch.compile(model, backend=backend, fullgraph=True), torch.randn(2, 3, 32, 32)
    rho = next(buffer for name, buffer in model.named_buffers() if name.endswith("factor.rho"))
    for value in (1.0, 0.5, 0.0):
        rho.fill_(value)
        x.append(compiled(images))
    assert len(graphs) == 1 and not torch.equal(x[0], x[1]) and not torch.equal(x[1], x[2])
    torch.testing.assert_close(x[2], model(images))
