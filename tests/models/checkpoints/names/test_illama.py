"""Names of iLLaMA: the class token's row of a table is the last one there and the first one here."""

import torch

from models.checkpoints.names.layout import Axes


def test_the_last_entry_becomes_the_first_and_goes_back():
    axes, theirs = Axes("", "bnc", "bnc", last="n"), torch.arange(10).view(1, 5, 2)
    ours = axes.take(theirs)
    assert torch.equal(ours, theirs[:, [4, 0, 1, 2, 3]]) and torch.equal(axes.give(ours), theirs)
