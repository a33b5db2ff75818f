"""TensorBoard's event files: what goes wrong with them is said once, and training goes on."""

from collections.abc import Callable
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger

from models.side_outputs import attempt


class SafeTensorBoard(TensorBoardLogger):
    """A TensorBoardLogger that begins a new event file after one that could not be written."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._try(super().log_metrics, metrics, step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self._try(super().log_hyperparams, *args, **kwargs)

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        self._try(super().log_graph, *args, **kwargs)

    def save(self) -> None:
        self._try(super().save)

    def finalize(self, status: str) -> None:
        self._try(super().finalize, status)

    def _try(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if not attempt("logger: TensorBoard", call, *args, **kwargs):
            self._experiment = None
