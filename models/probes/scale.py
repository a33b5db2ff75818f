"""A training on many GPUs, on paper: hours, efficiency and what limits it (`models.scaling`)."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from conf import values
from conf.errors import UserError
from models.cost import parameters
from models.probes import Report, Subject
from models.scaling import GRADIENT, STATES, Machine, row_of, step_of


def scale(
    network: nn.Module,
    subject: Subject,
    images_per_second: float | None = None,
    batch: int = 128,
    gpus: Sequence[int] = (1, 8, 64, 512),
    global_batch: int = 1024,
    epochs: int = 300,
    images: int = 1_281_167,
    image_kb: float = 110,
    launches: int = 1500,
    launch_us: float = 15.0,
    node: int = 8,
    inside: float = 400.0,
    between: float = 50.0,
    core_images: float = 440.0,
    cores: int = 16,
) -> Report:
    """A row for every number of GPUs: hours, GPU hours, efficiency, what limits it and which setting takes over.

    Args:
        network, subject: see `models.probes`.
        images_per_second: of training on one GPU with `batch` images at once.
        others: see conf/probe/scale.yaml.

    Raises:
        UserError: the speed of one GPU is not given, or a number of GPUs is none.
    """
    if images_per_second is None:
        raise UserError(
            "scale: images_per_second of one GPU must be given, got null; train on one for an epoch, which prints it, "
            "then set probe.images_per_second"
        )
    values.number("scale", "images_per_second", images_per_second, 1e-9, fix="set probe.images_per_second=2700")
    counts = [values.whole("scale", "gpus", count, fix="set e.g. 'probe.gpus=[1,8]'") for count in gpus]
    machine = Machine(node, inside, between, core_images, cores, launches * launch_us * 1e-6)
    size, total = parameters(network), global_batch
    steps = {n: step_of(n, total, batch, images_per_second, size, machine) for n in counts if n <= total}
    rows = [
        row_of(n, step, total, epochs, images, image_kb, steps[min(steps)], min(steps)) for n, step in steps.items()
    ]
    checkpoint = STATES * GRADIENT * size
    lines = [
        "computed, not measured, from the speed of one GPU; a step's gradients are "
        f"{GRADIENT * size / 1e6:,.0f} MB, a checkpoint {checkpoint / 1e6:,.0f} MB",
        *(f"{n} GPUs: more than the {total} images of a step; raise global_batch" for n in counts if n > total),
    ]
    figures = {"parameters": size, "gradient_bytes": GRADIENT * size, "checkpoint_bytes": checkpoint}
    figures |= {f"hours/{row['gpus']}": row["hours"] for row in rows}
    return Report(
        figures,
        {f"{row['gpus']} GPU{'s' if row['gpus'] > 1 else ''}": _shown(row) for row in rows},
        tables={"scale": rows},
        lines=lines,
    )


def _shown(row: dict[str, Any]) -> str:
    return (
        f"{row['hours']:,.1f} h, {row['gpu_hours']:,.0f} GPU h, {row['efficiency']:.0%}; step {row['step_ms']:.1f} ms; "
        f"reads {row['storage_mb_per_second']:,.0f} MB/s; limit: {row['limit']}"
    )
