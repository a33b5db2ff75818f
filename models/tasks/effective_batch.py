"""Images per optimizer step: as many as asked for, whatever the devices hold.

A step sees batch x processes x accumulated images. `global_batch` fixes the product, and the number of accumulated
batches follows. Batches are global (`data/order/sampler.py`), so that a step sees the same images on any devices; and
an epoch has whole steps only: batches that are left at its end are not used, as an incomplete batch is not.
"""

from typing import Any

import pytorch_lightning as pl

from conf import recipes
from conf.errors import UserError
from data.place import readers


def images_per_step(trainer: pl.Trainer, data: pl.LightningDataModule) -> int:
    """Images per optimizer step over all processes, accumulated ones included."""
    return data.batch_size * readers(trainer) * trainer.accumulate_grad_batches


def scaled_rate(rate: float, reference_batch: int | None, images: int) -> float:
    """The learning rate for that many images per step: in proportion to the batch it is meant for (linear rule)."""
    return rate * (images / reference_batch) if reference_batch else rate


def accumulate(config: dict[str, Any], trainer: pl.Trainer, data: pl.LightningDataModule) -> None:
    """Lets the trainer accumulate batches to `config["global_batch"]` images, and writes their number into `config`.

    Raises:
        UserError: the devices cannot make that number, or the configuration contradicts itself.
    """
    images, given = config["global_batch"], config["trainer"]["accumulate_grad_batches"]
    if images is None:
        return
    if type(images) is not int or images < 1:
        raise UserError(f"global_batch: must be a whole number of at least 1, got {images!r}; set global_batch=1024")
    at_once = data.batch_size * readers(trainer)
    if images % at_once:
        raise UserError(_does_not_fit(images, data.batch_size, readers(trainer)))
    batches = images // at_once
    if given not in (None, 1, batches):
        raise UserError(
            f"global_batch: {images} images per step are {batches} batches of {at_once}, "
            f"got trainer.accumulate_grad_batches={given}; leave one of the two out"
        )
    if batches > 1:
        trainer.limit_train_batches = _whole_steps(images, batches, trainer, data)
    trainer.accumulate_grad_batches = config["trainer"]["accumulate_grad_batches"] = batches


def check_resumed(saved: dict[str, Any], trainer: pl.Trainer) -> None:
    """Refuses to go on with other steps: schedule, epoch and averages are counted in them.

    Args:
        saved: the configuration in the checkpoint.

    Raises:
        UserError: the checkpoint comes from steps of another number of accumulated batches.
    """
    before = saved.get("trainer", {}).get("accumulate_grad_batches") or 1
    if before != trainer.accumulate_grad_batches:
        raise UserError(
            f"resume: the checkpoint was trained with {before} batches accumulated per optimizer step, "
            f"got {trainer.accumulate_grad_batches}; give the same global_batch, data.batch_size and number of "
            "processes, or start a new run with another run.name"
        )


def describe(config: dict[str, Any], trainer: pl.Trainer, data: pl.LightningDataModule) -> str:
    """What a step is made of and its learning rate, in one line.

    "batch 128 x 1 process x 8 accumulated = 1024 images per step; learning rate 5e-04 x 1024/512 = 1e-03 (linear
    rule)", and what the recipe of the run trains with where that is another number.
    """
    images, accumulated = images_per_step(trainer, data), trainer.accumulate_grad_batches
    processes = f"{readers(trainer)} process{'es' if readers(trainer) > 1 else ''}"
    if images == data.batch_size:
        step = f"batch {images} on {processes}"
    else:
        parts = [f"batch {data.batch_size}", processes, *([f"{accumulated} accumulated"] if accumulated > 1 else [])]
        step = f"{' x '.join(parts)} = {images} images per step"
    recipe = config["run"]["recipe"]
    wanted = recipes.load(recipe).get("global_batch") if recipe in recipes.names() else None
    differs = f"; the recipe trains with {wanted}" if wanted not in (None, images) else ""
    return f"{step}; {_rate(config['optimizer'], images)}{differs}"


def _rate(optimizer: dict[str, Any], images: int) -> str:
    rate, reference = optimizer.get("lr"), optimizer.get("reference_batch")
    if rate is None:
        return "learning rate of the optimizer"
    if not reference:
        return f"learning rate {_short(rate)}, as given"
    scaled = scaled_rate(rate, reference, images)
    return f"learning rate {_short(rate)} x {images}/{reference} = {_short(scaled)} (linear rule)"


def _short(rate: float) -> str:
    """ "1e-03", "1.25e-04"."""
    digits, _, exponent = f"{rate:.3e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{exponent}"


def _whole_steps(images: int, accumulated: int, trainer: pl.Trainer, data: pl.LightningDataModule) -> int:
    """Batches of an epoch that make whole steps."""
    limit, batches = trainer.limit_train_batches, data.steps_per_epoch(readers(trainer))
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if batches < accumulated:
        raise UserError(
            f"global_batch: {images} images per step are {accumulated} batches, but an epoch has {batches}; "
            f"set global_batch={max(batches, 1) * images // accumulated} or less, or global_batch=null"
        )
    return batches // accumulated * accumulated


def _does_not_fit(images: int, batch: int, processes: int) -> str:
    fitting = [size for size in range(1, images // processes + 1) if images % (size * processes) == 0]
    near = min(fitting, key=lambda size: (abs(size - batch), -size), default=None)
    change = f"data.batch_size={near}{_product(images, near, processes)} or " if near else ""
    return (
        f"global_batch: {images} images per step cannot be made of {batch} x {processes} "
        f"process{'es' if processes > 1 else ''}; "
        f"set {change}global_batch={max(images // (batch * processes), 1) * batch * processes}"
    )


def _product(images: int, batch: int, processes: int) -> str:
    """ " (1024 = 64 x 8 x 2)", or "" where the batch is all."""
    factors = [batch, *(factor for factor in (processes, images // (batch * processes)) if factor > 1)]
    return f" ({images} = {' x '.join(map(str, factors))})" if len(factors) > 1 else ""
