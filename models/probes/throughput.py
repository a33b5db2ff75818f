"""How fast a model is and what it holds in memory: images per second, latency, peak memory, the largest batch."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from conf import values
from models.cost import example_inputs
from models.largest import largest as largest_batch
from models.probes import Report, Subject

WARM_UP, LEAST = 2, 5  # passes before the first that counts, and that count at least


def throughput(
    network: nn.Module,
    trainer: pl.Trainer,
    subject: Subject,
    batches: list[int] | int = (1, 8, 32, 128),
    seconds: float = 2.0,
    largest: bool = True,
) -> Report:
    """Forward passes in evaluation mode on random images, in the precision of the trainer, on its device.

    Args:
        network, trainer, subject: see `models.probes`.
        batches: images at once; latency is that of the first.
        seconds: to spend on each; the median pass gives images per second.
        largest: on a GPU look for the largest batch that its memory holds.
    """
    values.number("throughput", "seconds", seconds, fix="set probe.seconds=2")
    sizes = [batches] if isinstance(batches, int) else list(batches)
    for size in sizes:
        values.whole("throughput", "batches", size, fix="set probe.batches=[1,64]")
    device, pixels = trainer.strategy.root_device, subject.config["image_size"]
    pixels = (pixels, pixels) if isinstance(pixels, int) else tuple(pixels)

    def prepared(batch: int) -> Callable[[], Tensor]:
        image, *others = example_inputs(network, pixels, batch)
        inputs = (image.contiguous(memory_format=torch.channels_last), *others)
        return lambda: network(*inputs)

    with torch.inference_mode(), trainer.precision_plugin.forward_context():
        rows = list(_rows(prepared, sizes, seconds, device))
        fits = _largest(prepared, rows[-1]["batch"]) if largest and device.type == "cuda" and rows else None
    best = max(rows, key=lambda row: row["images_per_second"])
    figures = {
        "images_per_second": best["images_per_second"],
        "batch": best["batch"],
        "latency_p50_ms": rows[0]["p50_ms"],
        "latency_p95_ms": rows[0]["p95_ms"],
        "latency_batch": rows[0]["batch"],
        "peak_memory": max(row["peak_memory"] for row in rows),
        "largest_batch": fits,
        "precision": str(trainer.precision),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
    }
    return Report(figures, _shown(rows, figures), tables={"batches": rows}, lines=_said(rows, sizes, device, fits))


def _rows(prepared: Callable, sizes: list[int], seconds: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each size, until the memory does not hold one; on a CPU until a pass takes longer than its time."""
    for batch in sizes:
        try:
            passes, memory = _timed(prepared(batch), seconds, device)
        except torch.OutOfMemoryError:
            if batch == sizes[0]:
                raise
            return
        p50, p95 = np.percentile(passes, [50, 95]) * 1e3
        speed = batch / float(np.median(passes))
        row = {"batch": batch, "images_per_second": speed, "p50_ms": float(p50), "p95_ms": float(p95)}
        yield row | {"peak_memory": memory, "passes": len(passes)}
        if device.type == "cpu" and p50 > seconds * 1e3:
            return


def _timed(run: Callable[[], Tensor], seconds: float, device: torch.device) -> tuple[list[float], int]:
    """Seconds of every pass, each waited for, and the most memory that was held, in bytes."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    passes, start = [], time.perf_counter()
    for number in range(10**6):
        before = time.perf_counter()
        run()
        if gpu:
            torch.cuda.synchronize(device)
        if number >= WARM_UP:
            passes.append(time.perf_counter() - before)
        if len(passes) >= LEAST and time.perf_counter() - start > seconds:
            break
    unit = 1 if sys.platform == "darwin" else 1024
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return passes, torch.cuda.max_memory_allocated(device) if gpu else held


def _largest(prepared: Callable, known: int) -> int:
    """The largest batch of one pass."""

    def fits(batch: int) -> bool:
        try:
            prepared(batch)()
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    return largest_batch(fits, known)


def _shown(rows: list[dict[str, Any]], figures: dict[str, Any]) -> dict[str, Any]:
    shown = {
        f"batch {row['batch']}": f"{row['images_per_second']:,.1f} images/s, p50 {row['p50_ms']:.2f} ms, "
        f"p95 {row['p95_ms']:.2f} ms, peak {row['peak_memory'] / 2**20:,.0f} MiB"
        for row in rows
    }
    largest = {} if figures["largest_batch"] is None else {"largest batch": figures["largest_batch"]}
    return shown | largest | {"on": f"{figures['device']}, precision {figures['precision']}"}


def _said(rows: list[dict[str, Any]], sizes: list[int], device: torch.device, fits: int | None) -> list[str]:
    lines = []
    if left := sizes[len(rows) :]:
        why = "the memory does not hold them" if device.type == "cuda" else "a pass took longer than probe.seconds"
        lines.append(f"batches left out: {', '.join(map(str, left))}: {why}")
    if device.type == "cpu":
        lines.append(f"{torch.get_num_threads()} threads; peak memory is that of the whole process on a CPU")
    return lines
