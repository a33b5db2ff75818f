"""`ImageData`: a source, an augmentation and a sampler as a Lightning data module, built from `conf/data/*.yaml`.

Resuming: the state is the position (epoch, batch) of the next batch to be processed. Lightning restores it before
loaders exist, the sampler starts there, and the images that follow are those that an uninterrupted run would have
seen, bit for bit, whatever the number of workers. Use `use_distributed_sampler=False` in the trainer.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from conf.errors import UserError
from data import workers as processes
from data.augment import Augment
from data.batch import Batch
from data.cautions import cautions
from data.changes import check_same
from data.checks import data_problems, setting_problems, trainer_problems
from data.dataset import Samples, Skips, collate_carried, delivered
from data.device import DeviceStage
from data.loader import EpochLoader, loader, worker_count
from data.order.fingerprint import fingerprint
from data.order.layout import Layout
from data.order.sampler import Draw, EpochBatchSampler, EvaluationBatchSampler
from data.order.spread import spread_over
from data.place import place
from data.sources import Source
from data.sources.form import Form, per_channel
from data.sources.part import Part, subset_problems
from data.token_labels import LabelMaps
from data.transforms import Evaluation, EvaluationTransform, TrainTransform, is_size
from data.view import LogPolar, seen


class ImageData(pl.LightningDataModule):
    """Images with labels.

    Args:
        source: where images come from (`data.sources`).
        num_classes: known before data is read, because the model needs it.
        image_size: of training images in pixels, one number or (height, width); with a `view`, of what it is made of.
        batch_size: images per process and batch, in training and evaluation; a run makes a number of `auto` before
            (`models.runs.batch_size`).
        seed: names order and augmentation.
        augment: values of `data.augment.Augment`.
        eval: values of `data.transforms.Evaluation`.
        view: what is made of every image last, `logpolar` with or without options (`data.view`); None for nothing.
        mean, std: per channel, of images scaled to 0 … 1; of float images as they are.
        channels: of the images that the model sees, 1 to 16.
        depth: `uint8`, `uint16` or `float32`: what numbers are read from the files (`data.sources.form`).
        workers: loader processes per training process, or `auto`: none for an embedded source, else one per CPU
            core that this process may count on, at most 8.
        drop_last: leave out the last training batch of an epoch when it is not full.
        balanced: draw as many images of every class in an epoch, which has as many as there are; those of small
            classes then come several times, and some of large ones not at all.
        on_error: `raise` names the unreadable image and stops; `skip` reports it once and trains without it
            (the batch gets smaller). Evaluation always raises: its figure would be of another data set.
        max_skipped: the share of training images that `skip` may leave out; ten always may, a whole class never.
        timeout: seconds to wait for a batch from a worker before the run fails instead of hanging.
        root, val_fraction, split, classes: of a source that has them (`data.sources.imagefolder`), which gets them
            itself; here they have short names on the command line.
        subset: trains on a part of the images only, `10%` of each class or so many of each (`data.sources.part`).
        token_labels: the folder of label maps for the training images (`data.token_labels`).

    A task that trains with label maps sets `token_grid`, rows and columns of its model's tokens, before training.
    """

    def __init__(
        self,
        source: Source,
        num_classes: int,
        image_size: int | Sequence[int],
        batch_size: int | Literal["auto"],
        seed: int = 0,
        augment: Mapping[str, Any] | None = None,
        eval: Mapping[str, Any] | None = None,
        view: str | Mapping[str, Any] | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        channels: int = 3,
        depth: str = "uint8",
        workers: int | str = "auto",
        drop_last: bool = True,
        balanced: bool = False,
        on_error: str = "raise",
        max_skipped: float = 0.001,
        timeout: float = 300,
        root: str | None = None,
        val_fraction: float | None = None,
        split: str | None = None,
        classes: str | None = None,
        subset: str | int | None = None,
        token_labels: str | None = None,
    ) -> None:
        super().__init__()
        self.subset = subset
        self.source = Part(source, subset, seed) if subset is not None and not subset_problems(subset) else source
        self.num_classes, self.batch_size = num_classes, batch_size
        self.crop_size = tuple(image_size) if hasattr(image_size, "__iter__") else image_size
        self.view = LogPolar.build(view)
        self.image_size = seen(self.view, self.crop_size) if is_size(self.crop_size) else self.crop_size
        self.balanced = balanced
        self.seed, self.workers, self.drop_last, self.on_error = seed, workers, drop_last, on_error
        self.max_skipped = max_skipped
        self.form = Form(channels, depth)
        self.mean, self.std = (per_channel(values, self.form) for values in (mean, std))
        self.timeout, self.root, self.token_labels = timeout, root, token_labels
        self.token_grid: tuple[int, int] | None = None
        self.augment = Augment.build(augment)
        self.evaluation = Evaluation.build(eval)
        self.begun: Layout | None = None  # that the run began with, where this is another one
        self._accumulated = 1  # until there is a trainer
        self.start_epoch: int | None = None  # None: the epoch that Lightning counts
        self.start_batch = 0
        self._delivered: tuple[int, int] | None = None  # epoch and number of the last training batch handed out
        self._skips: Skips | None = None
        self._loaders: list[EpochLoader] = []

    # What others may ask before the trainer exists

    @property
    def channels(self) -> int:
        """Of the images that the model sees."""
        return self.form.channels

    @property
    def depth(self) -> str:
        """Of the numbers that images hold."""
        return self.form.depth

    @property
    def class_names(self) -> list[str]:
        return list(self.source.classes)

    def steps_per_epoch(self, world_size: int = 1) -> int:
        """Training batches of an epoch per process."""
        return len(self._train_sampler(0, world_size))

    def warnings(self, world_size: int = 1) -> list[str]:
        """What is allowed but seldom meant (`data.cautions`), a sentence each; asks for the splits."""
        return cautions(self, world_size)

    def notes(self) -> list[str]:
        """What the source has to say about its images, such as how they were split, for the first lines of a run."""
        return self.source.notes() if hasattr(self.source, "notes") else []

    def smallest_batch(self, world_size: int = 1) -> int:
        """Images of the smallest training batch of a process."""
        return self._train_sampler(0, world_size).smallest

    @property
    def reading_processes(self) -> int:
        """Loader processes of this training process."""
        return self._worker_count

    def skipped_images(self) -> list[tuple[str, str, str]]:
        """Path, class and reason of every training image that `on_error=skip` has left out; each is tried once more."""
        split, found = self.source.train, []
        for index in self._skips.indices if self._skips is not None else ():
            try:
                split[index]
                reason = "it can be read now"
            except (UserError, OSError) as error:
                reason = str(error).partition("(")[2].rpartition(")")[0] or str(error)
            label = split.labels[index]
            name = self.class_names[int(label)] if np.ndim(label) == 0 else ""
            found.append((split.path(index) if hasattr(split, "path") else str(index), name, reason))
        return found

    @property
    def skipped(self) -> int:
        """Different training images that `on_error=skip` has left out so far, over all workers of this process."""
        return self._skips.count if self._skips is not None else 0

    def check(self, training: bool = True) -> None:
        """Everything that can be known before training, or before evaluation, is checked, without decoding images.

        Raises:
            ValueError: all problems, one per line.
        """
        problems = setting_problems(self) or [
            *trainer_problems(self.trainer),
            *data_problems(self, self._place()[1], training),
        ]
        if problems:
            raise UserError("\n  - ".join([f"ImageData: {len(problems)} problem(s) with the data", *problems]))

    # Loaders

    def setup(self, stage: str) -> None:
        """Checks; a new fit begins at the first batch unless a checkpoint, restored after this, says otherwise."""
        self.check(training=stage == "fit")
        if stage == "fit":
            self.fingerprint  # noqa: B018 - before training, which the first save would hold up
            self.start_epoch, self.start_batch, self._delivered = None, 0, None
        self._loaders.clear()

    def train_dataloader(self) -> DataLoader:
        split = self.source.train
        labels = np.asarray(split.labels)
        self._skips = Skips(labels, self.max_skipped, self.class_names) if self.on_error == "skip" else None
        transform = TrainTransform(self.augment, self.crop_size, self.mean, self.form)
        maps = None if self.token_labels is None else LabelMaps(self.token_labels, split, self.num_classes)
        samples = Samples(split, transform, self.seed, self._skips, maps, self.form)
        sampler = self._train_sampler(*self._place())
        sampler.start_epoch, sampler.start_batch = self.start_epoch, self.start_batch
        return self._loader(samples, sampler)

    def val_dataloader(self) -> DataLoader:
        split = self.source.val
        transform = EvaluationTransform(self.evaluation, self.crop_size, self.form)
        samples = Samples(split, transform, seed=None, form=self.form)
        return self._loader(samples, EvaluationBatchSampler(len(split), self.batch_size, *self._place()))

    test_dataloader = val_dataloader

    def evaluated(self, places: Sequence[int]) -> Batch:
        """Images of validation by their places in the split, as evaluation gives them to a model."""
        samples = self.val_dataloader().dataset.__getitems__([Draw(0, place) for place in places])
        return self._stage(delivered(collate_carried(samples)), training=False)

    def spread(self, count: int) -> list[int]:
        """So many places at equal distance in the split of validation, which often comes class by class."""
        return spread_over(len(self.source.val), count)

    def batches_of(self, batch: int, processes: int, accumulated: int) -> int:
        """Training batches of an epoch per process in another layout."""
        layout = Layout(batch, processes, accumulated, 0)
        return len(self._train_sampler(0, processes, layout))

    def go_on_with(self, begun: Layout, batch_size: int, accumulated: int) -> None:
        """Deals the steps of the layout that the run began with in batches of another one; called before training."""
        self.begun, self.batch_size, self._accumulated = begun, batch_size, accumulated

    def _train_sampler(self, rank: int, world: int, layout: Layout | None = None) -> EpochBatchSampler:
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0
        accumulated = self._accumulated if self.trainer is None else self.trainer.accumulate_grad_batches
        return EpochBatchSampler(
            len(self.source.train),
            self.batch_size if layout is None else layout.batch,
            self.seed,
            rank,
            world,
            repeats=self.augment.repeated,
            drop_last=self.drop_last,
            shuffle=not overfit,
            labels=np.asarray(self.source.train.labels) if self.balanced else None,
            accumulated=accumulated if layout is None else layout.accumulated,
            blocks=getattr(self.source.train, "blocks", None),
            begun=self.begun if layout is None else None,
        )

    def _loader(self, samples: Samples, sampler: EpochBatchSampler | EvaluationBatchSampler) -> DataLoader:
        made = loader(samples, sampler, self._worker_count, self.timeout, self.seed)
        self._loaders.append(made)
        return made

    def on_exception(self, exception: BaseException) -> None:
        """The run is over: a worker that hangs does not hold its end."""
        for made in self._loaders:
            processes.end(made)

    @cached_property
    def _worker_count(self) -> int:
        processes = self.trainer.num_devices if self.trainer is not None else 1
        return worker_count(self.workers, self.source.embedded, processes)

    def _place(self) -> tuple[int, int]:
        """Rank of this process and the number of processes."""
        return place(self.trainer)

    # The device stage

    @cached_property
    def _stage(self) -> DeviceStage:
        return DeviceStage(self.mean, self.std, self.augment, self.num_classes, self.seed, self.form.depth, self.view)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Whole numbers to normalised float on the device; training batches are mixed and erased, and counted."""
        training = self.trainer is not None and self.trainer.training
        if training:
            self._delivered = (batch.epoch, batch.number)
        return self._stage(batch, training, self._place()[0], self.token_grid)

    # Resuming

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What the data is, wherever it lies (`data.order.fingerprint`)."""
        return fingerprint(self.class_names, train=self.source.train, val=self.source.val)

    def state_dict(self) -> dict[str, Any]:
        """The position of the next training batch to be processed, what it was counted with, and of which data."""
        epoch, batch = self._position()
        now = self._layout()
        begun = now if self.begun is None else self.begun
        batch = batch // now.accumulated * begun.accumulated  # of a step that was not finished nothing is kept
        position = {"epoch": epoch, "batch": batch, **self._counted_with(), "begun": list(begun)}
        return position | {"data": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Training starts at the stored position; evaluating a checkpoint has no use for it.

        Raises:
            ValueError: with another global batch, seed or number of images the batches that follow do not exist; or
                the data has changed.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        for name, value in self._counted_with().items():
            if state[name] != value:
                raise UserError(
                    f"ImageData: the checkpoint is at batch {state['batch']} of epoch {state['epoch']}, counted with "
                    f"{name}={state[name]}, got {name}={value}; resume with the same data, seed and batch_size × "
                    "processes, or start a new run from the checkpoint's weights"
                )
        if "data" in state:  # older checkpoints do not know
            check_same(state["data"], self.fingerprint)
        self.start_epoch, self.start_batch = int(state["epoch"]), int(state["batch"])
        if self.begun is not None:  # a checkpoint is behind a whole step
            self.start_batch = self.start_batch // self.begun.accumulated * self._layout().accumulated

    def _counted_with(self) -> dict[str, int]:
        layout = self._layout() if self.begun is None else self.begun
        return {
            "global_batch": layout.batch * layout.processes,
            "seed": self.seed,
            "images": len(self.source.train),
        }

    def _layout(self) -> Layout:
        """Of this run as it is; an epoch has the batches that the trainer takes."""
        world, trainer = self._place()[1], self.trainer
        taken = None if trainer is None else trainer.num_training_batches
        batches = taken if isinstance(taken, int) and taken > 0 else self.steps_per_epoch(world)
        return Layout(self.batch_size, world, 1 if trainer is None else trainer.accumulate_grad_batches, batches)

    def _position(self) -> tuple[int, int]:
        if self._delivered is None:
            current = self.trainer.current_epoch if self.trainer is not None else 0
            return (current if self.start_epoch is None else self.start_epoch), self.start_batch
        epoch, number = self._delivered
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        if progress.current.processed < progress.current.ready:
            return epoch, number  # handed out, but its step has not been taken
        if number + 1 >= self.trainer.num_training_batches or progress.is_last_batch:
            return epoch + 1, 0
        return epoch, number + 1
