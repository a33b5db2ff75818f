"""Memory that was not there: what was asked for, and the settings that keep the images of a step."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from conf.errors import UserError

SAID = re.compile(
    r"out of memory|(can't|cannot|failed to|unable to) allocate|not enough memory|_ALLOC_FAILED|OUT_OF_MEMORY",
    re.IGNORECASE,
)
SHARED = re.compile(r"shared.memory|shm", re.IGNORECASE)  # of loaders and of kernels: another matter
ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]iB)", re.IGNORECASE)
FREE = re.compile(r"total capacity of ([\d.]+ [KMGT]iB) of which ([\d.]+ [KMGT]iB) is free")
DEEP = 8  # causes of causes
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@contextmanager
def explained(config: dict[str, Any], trainer: pl.Trainer | None = None, training: bool = True) -> Iterator[None]:
    """Turns an error of memory into one sentence, and lets go of what the failed pass held.

    Args:
        config: resolved, of a run or an evaluation.
        trainer: None before there is one.
        training: whether it is a run.

    Raises:
        UserError: in place of any error that says so.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = shortage(error)
        if found is None:
            raise
        message = advice(found, config, trainer, training)
        traceback.clear_frames(error.__traceback__)
        raise UserError(message) from None


def shortage(error: BaseException | None) -> BaseException | None:
    """The error of memory that it is, or comes from; None where it has another reason."""
    for _ in range(DEEP):
        text = str(error)
        kinds = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if kinds or (isinstance(error, RuntimeError | OSError) and SAID.search(text) and not SHARED.search(text)):
            return error
        error = error.__cause__ if error is not None else None
    return None


def advice(error: BaseException, config: dict[str, Any], trainer: pl.Trainer | None, training: bool) -> str:
    """The sentence: where, how much, and what to set."""
    data, place = config.get("data") or {}, _place(error, trainer, training)
    batch = data.get("batch_size")
    tried = f" with data.batch_size={batch}" if batch else ""
    if "DataLoader worker" in str(error):
        workers = data.get("workers")
        return f"memory: a loader process ran out of it ({_asked(error)}); set data.workers=1 in place of {workers}"
    options = _options(config, trainer, training, batch) or ["a smaller model or image_size"]
    wanted = "any of these keeps the images of a step" if training else "this gives the same figures"
    return f"memory: {place} ran out of it{tried} ({_asked(error)}); {wanted}: {' | '.join(options)}"


def _place(error: BaseException, trainer: pl.Trainer | None, training: bool) -> str:
    if not training:
        return "the evaluation"
    if trainer is None:
        return "making the model"
    files = {Path(frame.filename).name for frame in traceback.extract_tb(error.__traceback__)}
    step = f"step {trainer.global_step + 1}"
    return f"the validation after step {trainer.global_step}" if "evaluation_loop.py" in files else step


def _options(config: dict[str, Any], trainer: pl.Trainer | None, training: bool, batch: Any) -> list[str]:
    """Settings that need less memory and change nothing else, those that are not yet so."""
    settings, found = config.get("trainer") or {}, []
    if isinstance(batch, int) and batch > 1:
        found.append(_smaller(config, trainer, batch) if training else f"data.batch_size={batch // 2}")
    if training and (config.get("task") or {}).get("gradient_checkpointing") is False:
        found.append("task.gradient_checkpointing=true (slower by a third)")
    if "mixed" not in str(settings.get("precision")):
        found.append("trainer.precision=bf16-mixed")
    return found


def _smaller(config: dict[str, Any], trainer: pl.Trainer | None, batch: int) -> str:
    """Half the batch, or the next size that the images of a step can be made of, and twice the accumulation."""
    accumulated = trainer.accumulate_grad_batches if trainer is not None else 1
    images = batch * accumulated
    half = next(size for size in range(batch // 2, 0, -1) if images % size == 0)
    if config.get("global_batch") is not None:
        return f"data.batch_size={half} (global_batch={config['global_batch']} makes up for it)"
    return f"data.batch_size={half} trainer.accumulate_grad_batches={images // half}"


def _asked(error: BaseException) -> str:
    """ "2.0 GiB were asked for, 512.0 MiB were free"."""
    text, parts = str(error), []
    if asked := ASKED.search(text):
        amount, unit = float(asked[1]), asked[2]
        parts.append(f"{_amount(int(amount)) if unit == 'bytes' else f'{amount:g} {unit}'} were asked for")
    if free := FREE.search(text):
        parts.append(f"{free[2]} of {free[1]} were free")
    elif (left := _free(error)) is not None:
        parts.append(f"{_amount(left)} were free")
    return ", ".join(parts) or (text.strip().splitlines() or ["nothing more is known"])[0]


def _free(error: BaseException) -> int | None:
    """Bytes that are free now, of the GPU or of the machine; None where it is not known."""
    if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _amount(size: float) -> str:
    for unit in UNITS:
        if size < 1024 or unit == UNITS[-1]:
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
