"""A loss far above that of the steps before is said once, with the images of the step."""

from types import SimpleNamespace

import pytest
import torch

from models.callbacks.spikes import FILE, Spikes
from tests.models.callbacks.tiny_run import fit

pytestmark = pytest.mark.case(44)


class Steps:
    """A run of losses on one process, without a model."""

    def __init__(self, folder, device="cpu", every=10, world=1):
        self.trainer = SimpleNamespace(
            **{"global_step": 0, "current_epoch": 0, "world_size": world, "is_global_zero": True},
            **{
                "log_every_n_steps": every,
                "default_root_dir": folder,
                "accumulate_grad_batches": 1,
                "optimizers": [],
                "datamodule": None,
            },
            strategy=SimpleNamespace(reduce=lambda value, reduce_op: value),
        )
        self.task = SimpleNamespace(device=torch.device(device))

    def take(self, spikes, losses):
        for loss in losses:
            self.trainer.global_step += 1
            batch = SimpleNamespace(indices=torch.tensor([self.trainer.global_step, 7]))
            spikes.on_train_batch_end(self.trainer, self.task, {"loss": torch.tensor(loss)}, batch, 0)


def noise(count, seed=0, level=2.0):
    return (level + 0.1 * torch.randn(count, generator=torch.Generator().manual_seed(seed))).tolist()


def test_a_jump_is_said_once_and_every_step_of_it_is_kept(tmp_path, capsys):
    spikes, steps = Spikes(window=64), Steps(tmp_path)
    spikes.on_train_start(steps.trainer, steps.task)
    steps.take(spikes, [*noise(64), 9.0, 8.0, *noise(10, seed=1)])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.startswith("step 65, epoch 0: the training loss 9 is far above its median of the last 64 steps, 2.0")
    assert "spikes.csv has all of its images 65, 7" in out
    rows = (tmp_path / FILE).read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "65", "66"] and rows[1].endswith(",65 7")


@pytest.mark.parametrize(
    "losses",
    [
        noise(400),
        [3 * 0.99**step + 0.05 * (step % 2) for step in range(400)],
        [0.5] * 100 + [0.52] * 100,
        [*noise(20), 50.0],  # too early to tell
        [*noise(100), float("nan"), float("inf"), *noise(20)],
    ],
)
def test_ordinary_losses_are_no_jumps(tmp_path, capsys, losses):
    spikes, steps = Spikes(), Steps(tmp_path)
    spikes.on_train_start(steps.trainer, steps.task)
    steps.take(spikes, losses)
    assert capsys.readouterr().out == "" and not (tmp_path / FILE).exists()


def test_several_processes_look_when_they_log(tmp_path, capsys):
    spikes, steps = Spikes(window=32), Steps(tmp_path, every=10)
    steps.task.device = torch.device("meta")  # stands for a GPU
    spikes.on_train_start(steps.trainer, steps.task)
    steps.take(spikes, [*noise(34), 9.0])
    assert capsys.readouterr().out == ""
    steps.take(spikes, noise(5))
    assert capsys.readouterr().out.startswith("step 35, epoch 0")


def test_a_checkpoint_between_two_looks_knows_every_loss(tmp_path, capsys):
    spikes, steps = Spikes(window=32), Steps(tmp_path, every=10, world=1)
    steps.task.device = torch.device("meta")  # stands for a GPU
    spikes.on_train_start(steps.trainer, steps.task)
    steps.take(spikes, [*noise(34), 9.0])
    checkpoint = {"callbacks": {spikes.state_key: spikes.state_dict()}}
    spikes.on_save_checkpoint(steps.trainer, steps.task, checkpoint)
    assert "step 35" in capsys.readouterr().out and checkpoint["callbacks"][spikes.state_key]["losses"][-1] == 9
    again = Spikes(window=32)
    again.load_state_dict(checkpoint["callbacks"][spikes.state_key])
    again.on_train_start(steps.trainer, steps.task)
    steps.take(again, [9.5] * 5)
    assert "the training loss" not in capsys.readouterr().out  # of several in a row the first is said
    rows = (tmp_path / FILE).read_text().splitlines()[1:]
    assert [int(row.partition(",")[0]) for row in rows] == list(range(35, 41))


def test_a_resumed_run_knows_the_losses_before_and_says_again_what_it_makes_again(tmp_path, capsys):
    spikes, steps = Spikes(window=32), Steps(tmp_path)
    spikes.on_train_start(steps.trainer, steps.task)
    steps.take(spikes, noise(40))
    state = spikes.state_dict()
    steps.take(spikes, [9.0])
    again, more = Spikes(window=32), Steps(tmp_path)
    again.load_state_dict(state)
    more.trainer.global_step = 40
    again.on_train_start(more.trainer, more.task)
    more.take(again, [9.0])
    assert capsys.readouterr().out.count("step 41") == 2
    assert len((tmp_path / FILE).read_text().splitlines()) == 2


def test_it_goes_along_with_a_run(tmp_path):
    fit(tmp_path, callbacks=(spikes := Spikes(window=8),), accumulate_grad_batches=2)
    assert len(spikes.state_dict()["losses"]) == 8


@pytest.mark.parametrize(("name", "value"), [("window", 3), ("window", True), ("factor", 0.5), ("factor", "many")])
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=f"Spikes: {name} must be"):
        Spikes(**{name: value})
