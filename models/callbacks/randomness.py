"""The randomness of a training step, dropout for one, from counters: a resumed run equals one that never stopped.

Nothing depends on the history of a random generator: the data module derives order and augmentation from counters, and
`StepRandomness` does the same for what layers draw.
"""

import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from conf.errors import UserError


class StepRandomness(Callback):
    """Seeds torch, NumPy and `random` before every training batch from (seed, epoch, batch number, rank).

    A batch that says by what it is `named`, since its run began on other processes, decides number and rank.
    """

    def __init__(self, seed: int) -> None:
        if type(seed) is not int or seed < 0:
            raise UserError(f"StepRandomness: seed must be an integer of at least 0, got {seed!r}")
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        epoch, number = getattr(batch, "epoch", None), getattr(batch, "number", None)
        if epoch is None or number is None:
            raise UserError(
                "StepRandomness: a training batch must be a named tuple with the fields epoch and number, "
                f"got {type(batch).__name__}; build it as data.Batch is built"
            )
        # processes that read the same images draw the same
        rank = (trainer.distributed_sampler_kwargs or {}).get("rank", trainer.global_rank)
        entropy = [self.seed, int(epoch), *(getattr(batch, "named", None) or (int(number), rank))]
        torch_seed, numpy_seed, python_seed = np.random.SeedSequence(entropy).generate_state(3, np.uint64).tolist()
        # The generator itself: torch.manual_seed costs 90 µs because it also prepares devices that are not there.
        torch.default_generator.manual_seed(torch_seed % 2**63)
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(torch_seed % 2**63)
        np.random.seed(numpy_seed % 2**32)
        random.seed(python_seed)
