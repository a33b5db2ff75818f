"""A terminal that cannot show the live line ends nothing."""

from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from models import side_outputs
from models.callbacks.progress import RunProgress
from models.callbacks.throughput import Throughput


@pytest.mark.parametrize("moment", ["start", "update", "stop"])
def test_a_live_line_that_fails_is_left(monkeypatch, capsys, moment):
    real = getattr(Progress, moment)

    def fail(self, *given, **named):
        if moment == "stop":
            real(self)  # or its thread would outlive the test
        raise OSError(5, "Input/output error")

    side_outputs.begin()
    progress = RunProgress(Throughput())
    progress.console = Console(force_terminal=True)
    monkeypatch.setattr(Progress, moment, fail)
    trainer = SimpleNamespace(is_global_zero=True, global_step=0, estimated_stepping_batches=1, max_epochs=1)
    trainer.current_epoch, trainer.log_every_n_steps, trainer.callback_metrics = 0, 1, {}
    task = SimpleNamespace(device=torch.device("cpu"))
    progress.on_train_start(trainer, task)
    trainer.global_step = 1
    progress.on_train_batch_end(trainer, task, None, None, 0)
    progress.on_train_epoch_end(trainer, task)
    progress.on_train_end(trainer, task)
    assert progress.live is None
    said = capsys.readouterr()  # while it is live, errors are shown above the line
    assert (said.out + said.err).count("the live line of the terminal failed (Input/output error)") == 1
