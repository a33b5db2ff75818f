"""The graph of a model for any batch, and where the mechanism allows it for any size of its images: `torch.export`."""

import logging
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from conf.errors import UserError
from models.export.subject import Subject

LARGEST = 2**15  # images in a batch, which the exporter wants to be told
PATIENCE = 600  # seconds for a graph of any size; what pads its maps into windows can take hours
LATE = "torch was still comparing sizes after ten minutes"


def program(subject: Subject, name: str, dynamic_size: bool, exporter: Callable[..., Any] | None = None) -> Any:
    """The graph, made on two images.

    Args:
        subject: the model and its inputs.
        name: of the format, for messages.
        dynamic_size: leave height and width open; the graph is then made on images of another size than in training,
            so that what is made for one size is made anew.
        exporter: `(model, inputs, dynamic_shapes=...)`, whose result has the graph as `exported_program`; None: that of
            torch, which gives the graph.

    Raises:
        UserError: the model does something that a graph cannot hold, or does it for one size only.
    """
    inputs = subject.larger() if dynamic_size else subject.of(0, 2)
    batch = Dim("batch", min=1, max=LARGEST)
    sizes = {2: Dim.AUTO, 3: Dim.AUTO} if dynamic_size else {}
    shapes = tuple({0: batch} | (sizes if place == 0 else {}) for place in range(len(inputs)))
    try:
        with silence(), torch.no_grad(), patience(PATIENCE if dynamic_size else 0):
            made = (exporter or torch.export.export)(subject.model, inputs, dynamic_shapes=shapes)
    except Exception as error:  # each mechanism has its own way to fail, and torch many words for it
        raise UserError(refusal(subject, name, innermost(error), dynamic_size)) from error
    sides = images_of(getattr(made, "exported_program", made))[-2:]
    fixed = [axis for axis, side in zip(("height", "width"), sides, strict=True) if isinstance(side, int)]
    if dynamic_size and fixed:
        reason = ValueError(f"{' and '.join(fixed)} of the images must stay as they are")
        raise UserError(refusal(subject, name, reason, dynamic_size))
    return made


def images_of(made: ExportedProgram) -> list[int | torch.SymInt]:
    """The shape of the first input in a graph; a side that is open is no whole number."""
    given = next(iter(made.graph_signature.user_inputs))
    return list(next(node.meta["val"].shape for node in made.graph.nodes if node.name == given))


def refusal(subject: Subject, name: str, error: Exception, dynamic_size: bool = False) -> str:
    """One sentence from a page of torch's."""
    words = LATE if LATE in str(error) else " ".join(str(error).split()) or type(error).__name__
    what = f"format={name}: {subject.mechanism}"
    if dynamic_size:
        return (
            f"{what} does not allow images of any size in one graph ({words[:160]}); leave dynamic_size out, or give "
            "image_size=... and export one file for each size"
        )
    if len(words) > 240:  # torch puts what it is about at the beginning, TorchScript at the end
        words = f"… {words[-240:]}" if name == "torchscript" else f"{words[:240]} …"
    return f"{what} cannot be held by it: {words}; choose another format: safetensors and hf hold every model"


def innermost(error: BaseException) -> Exception:
    """The cause at the end of a chain, which says what it is about."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Ends what takes longer, in the main thread of a process; 0 for ever.

    Raises:
        TimeoutError: it took longer.
    """

    def end(*_: object) -> None:
        raise TimeoutError(LATE)

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def silence() -> Iterator[None]:
    """Without the exporters' notes about themselves, which no user can act on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
