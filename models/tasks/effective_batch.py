"""Images per optimizer step: as many as asked for, whatever the devices hold.

A step sees batch x processes x accumulated images. `global_batch` fixes the product, and the number of accumulated
batches follows. Batches are global (`data/order/sampler.py`), so that a step sees the same images on any devices; and
an epoch has whole steps only: batches that are left at its end are not used, as an incomplete batch is not.
"""

from typing import Any

import pytorch_lightning as pl
import torch

from conf import recipes
from conf.errors import UserError
from conf.values import is_whole
from data.order.layout import Layout
from data.place import readers

Settings = dict[str, Any]


def images_per_step(trainer: pl.Trainer, data: pl.LightningDataModule) -> int:
    """Images per optimizer step over all processes, accumulated ones included."""
    return data.batch_size * readers(trainer) * trainer.accumulate_grad_batches


def scaled_rate(rate: float, reference_batch: int | None, images: int) -> float:
    """The learning rate for that many images per step: in proportion to the batch it is meant for (linear rule)."""
    return rate * (images / reference_batch) if reference_batch else rate


def share_of(trainer: pl.Trainer, batch: Any) -> float:
    """What the loss of this process's part of a batch is multiplied by before gradients are averaged over processes.

    1 where the parts are equal. They may not be where the last batch of an epoch is kept, or images are left out.
    """
    data = trainer.datamodule
    even = getattr(data, "drop_last", True) and getattr(data, "on_error", "raise") != "skip"
    if trainer.world_size == 1 or even:
        return 1.0
    mine = len(batch.images)
    total = torch.tensor(float(mine), device=batch.images.device)
    return mine * trainer.world_size / float(trainer.strategy.reduce(total, reduce_op="sum"))


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


def go_on(
    config: Settings, saved: Settings, position: Settings, trainer: pl.Trainer, data: pl.LightningDataModule
) -> list[str]:
    """Lets a run go on with the steps that it began with, on any number of processes: accumulation makes them up.

    Where more processes than before would make too large a step, each takes a smaller batch.

    Args:
        config: of this command; it gets the batch and the accumulated batches.
        saved: the configuration in the checkpoint.
        position: what the data has left in the checkpoint.
        trainer: of this command.
        data: of this command.

    Returns:
        What there is to say about it.

    Raises:
        UserError: the devices cannot make these steps, or the command asks for others.
    """
    begun = _begun(saved, position, data)
    if begun is None:
        accumulate(config, trainer, data)
        check_resumed(saved, trainer)
        return []
    batch, accumulated = _parts(begun, config, saved, readers(trainer), data.batch_size)
    now = _shared(begun, batch, readers(trainer), accumulated)
    trainer.accumulate_grad_batches = config["trainer"]["accumulate_grad_batches"] = accumulated
    config["data"]["batch_size"] = batch
    if now == begun:
        data.batch_size = batch
        if accumulated > 1:
            trainer.limit_train_batches = begun.batches  # whole steps where the run had a global_batch
        return []
    trainer.limit_train_batches = now.batches
    if isinstance(limit := trainer.limit_val_batches, int):  # as many images as before
        trainer.limit_val_batches = -(-limit * begun.batch * begun.processes // (batch * now.processes))
    data.go_on_with(begun, batch, accumulated)
    return [f"began as {begun} (batch x processes x accumulated), goes on as {now}: the same images in every step"]


def _shared(begun: Layout, batch: int, processes: int, accumulated: int) -> Layout:
    """How these processes make the steps of a run, which is as it began where they are the same.

    Raises:
        UserError: they cannot make the shorter step at the end of an epoch.
    """
    if (batch, processes, accumulated) == begun[:3]:
        return begun
    now = begun.shared_anew(batch, processes, accumulated)
    if now is None:
        raise UserError(
            f"resume: an epoch of this run ends with a shorter step of {begun.batches % begun.accumulated} batches on "
            f"{begun.processes} processes, which {batch} x {processes} x {accumulated} cannot make; go on with "
            f"{begun} (data.batch_size x processes x accumulated), as it began"
        )
    return now


def _begun(saved: dict[str, Any], position: dict[str, Any], data: pl.LightningDataModule) -> Layout | None:
    """The layout that the run of a checkpoint began with, of an older one that of its run; None where nobody knows."""
    if isinstance(known := position.get("begun"), list) and len(known) == 4 and all(map(is_whole, known)):
        return Layout(*known)
    batch, settings = (saved.get("data") or {}).get("batch_size"), saved.get("trainer") or {}
    if "global_batch" not in position or type(batch) is not int or position["global_batch"] % batch:
        return None
    processes, accumulated = position["global_batch"] // batch, settings.get("accumulate_grad_batches") or 1
    batches, limit = data.batches_of(batch, processes, accumulated), settings.get("limit_train_batches", 1.0)
    limit = settings.get("overfit_batches") or limit
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if saved.get("global_batch") is not None:
        batches -= batches % accumulated
    return Layout(batch, processes, accumulated, batches)


def _parts(begun: Layout, config: dict[str, Any], saved: dict[str, Any], processes: int, batch: int) -> tuple[int, int]:
    """Images per process and batch, and batches per step, that make the steps of a run.

    Raises:
        UserError: nothing does, or the command asks for other steps.
    """
    asked, given = config["global_batch"], config["trainer"]["accumulate_grad_batches"]
    before = (saved.get("trainer") or {}).get("accumulate_grad_batches")
    if asked is not None and asked != begun.images:
        raise UserError(_other_steps(begun, f"global_batch={asked}"))
    free = batch in (begun.batch, (saved.get("data") or {}).get("batch_size"))  # the command says nothing new
    sizes = range(min(batch, begun.images), 0, -1) if free else (batch,)
    fitting = next((size for size in sizes if begun.images % (size * processes) == 0), None)
    if fitting is None:
        raise UserError(_cannot_make(begun, batch, processes))
    accumulated = begun.images // (fitting * processes)
    if given not in (None, 1, before, accumulated):
        raise UserError(_other_steps(begun, f"{batch} x {processes} x {given} = {batch * processes * given}"))
    return fitting, accumulated


def _other_steps(begun: Layout, got: str) -> str:
    return (
        f"resume: the checkpoint was trained with {begun.images} images per optimizer step, got {got}; leave "
        "global_batch and trainer.accumulate_grad_batches out, or start a new run with another run.name"
    )


def _cannot_make(begun: Layout, batch: int, processes: int) -> str:
    sizes = [size for size in range(1, begun.images // processes + 1) if begun.images % (size * processes) == 0]
    near = min(sizes, key=lambda size: (abs(size - batch), -size), default=None)
    devices = [count for count in range(processes, 0, -1) if begun.images % count == 0]
    what = f"data.batch_size={near}" if near else f"{devices[0]} process{'es' if devices[0] > 1 else ''}"
    return (
        f"resume: the checkpoint was trained with {begun.images} images per optimizer step, which batches of "
        f"{batch} on {processes} process{'es' if processes > 1 else ''} cannot make; take {what}"
    )


def check_resumed(saved: dict[str, Any], trainer: pl.Trainer) -> None:
    """Refuses to go on with other steps, where data says nothing of its batches: epochs are counted in them.

    Args:
        saved: the configuration in the checkpoint.
        trainer: of this command.

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
