"""Where a run stood behind its last finished step, so that a step that is broken off can be forgotten."""

from typing import Any

import pytorch_lightning as pl

from models.callbacks.left_out import Kept


class Boundary:
    """What changes between two optimizer steps: counters of Lightning and of the data, buffers of the model.

    Args:
        module: whose running statistics a forward pass changes; `models.callbacks.guard` may have copies of them.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._buffers: Kept = getattr(module, "kept", None) or Kept(module)
        self._epoch, self._loops, self._data = 0, {}, {}

    def note(self, trainer: pl.Trainer) -> None:
        """Behind a finished step."""
        self._buffers.keep()
        self._epoch, self._loops = trainer.current_epoch, trainer.fit_loop.state_dict()
        self._data = trainer.datamodule.state_dict() if trainer.datamodule is not None else {}

    def put_back(self) -> None:
        """The buffers, as they were then."""
        self._buffers.put_back()

    def write_into(self, checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
        """Has Lightning's mapping stand where the run stood then."""
        checkpoint["epoch"], checkpoint["loops"]["fit_loop"] = self._epoch, self._loops
        if self._data:
            checkpoint[type(trainer.datamodule).__qualname__] = self._data
