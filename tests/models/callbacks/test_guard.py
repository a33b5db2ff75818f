"""A run with a NaN stops, says where, and leaves the last good checkpoint as it was."""

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from models.callbacks.guard import NonFinite, NonFiniteGuard
from models.checkpoints import load_weights, verify
from models.checkpoints.format.directory import step_directories
from tests.models.callbacks.tiny_run import fit


def test_a_nan_loss_names_where_it_happened_and_what_is_left(tmp_path):
    match = (
        r"NonFiniteGuard: the training loss is NaN or infinite, got it at step 8, epoch 0, learning rate 0\.00556; "
        r"the last good checkpoint is .*step-00000006"
    )
    with pytest.raises(NonFinite, match=match):
        fit(tmp_path, nan_at=8)
    folder = tmp_path / "checkpoints"
    assert list(step_directories(folder)) == [3, 6]
    assert verify(folder / "last")["step"] == 6
    assert all(torch.isfinite(value).all() for value in load_weights(folder / "last").values())


def test_without_a_checkpoint_the_message_says_so(tmp_path):
    with pytest.raises(NonFinite, match=r"at step 2, epoch 0, .*; no checkpoint was saved before; lower the rate"):
        fit(tmp_path, nan_at=2)


class Interval(Callback):
    """Makes the guard read its flag rarely, as on a GPU."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_start(self, trainer, pl_module):
        next(c for c in trainer.callbacks if isinstance(c, NonFiniteGuard))._interval = self.steps


@pytest.mark.parametrize(("nan_at", "every", "kept"), [(2, 4, []), (5, 4, [4])])
def test_a_rarely_read_flag_is_read_before_each_save(tmp_path, nan_at, every, kept):
    """The first bad step is named, not the one at which the flag is read."""
    with pytest.raises(NonFinite, match=f"at step {nan_at}, epoch 0"):
        fit(tmp_path, nan_at=nan_at, every=every, callbacks=(Interval(50),))
    assert list(step_directories(tmp_path / "checkpoints")) == kept


def test_a_rarely_read_flag_is_read_at_the_end(tmp_path):
    with pytest.raises(NonFinite, match="at step 3, epoch 0"):
        fit(tmp_path, nan_at=3, every=0, limit_val_batches=0, callbacks=(Interval(50),))


def test_the_first_part_of_an_accumulated_batch_counts(tmp_path):
    with pytest.raises(NonFinite, match="training loss is NaN"):
        fit(tmp_path, nan_at=3, accumulate_grad_batches=2)


class Poison(Callback):
    """Weights that break while the loss of their step is still finite, as after an infinite gradient."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 6:
            with torch.no_grad():
                pl_module.model[0].weight[0, 0] = float("inf")


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    with pytest.raises(NonFinite, match=r"the weights hold NaN or infinity, got it at step 6, .*step-00000003"):
        fit(tmp_path, callbacks=(Poison(),))
    assert list(step_directories(tmp_path / "checkpoints")) == [3]


@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_arguments_are_checked(value):
    with pytest.raises(ValueError, match="NonFiniteGuard: every_n_steps must be at least 1 or null, got"):
        NonFiniteGuard(value)
