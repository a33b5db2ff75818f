"""What a step of a model launches: on fake tensors, at full size, with every grid and every size as on a GPU.

The models are on a floor above this folder, which must run without them: what a step is stands in `models.benchmark`,
found by name, and only when a model is asked for.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

from kernels.bench.counting import Meter, launching, touched
from kernels.launches import Launch, launch_of

KINDS = ("training", "inference")
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
DEFAULT_BATCH, LARGE_BATCH, SMALL_IMAGE = 128, 32, 256  # the papers' batches of a GPU, at 224 and at 384 or 512 px


class Model(NamedTuple):
    """A model and the images of its step; 0 pixels for the model's own."""

    name: str
    image_size: int = 0
    batch: int = 0

    @classmethod
    def named(cls, text: str) -> "Model":
        """Of "davit_base", "davit_base@512" or "davit_base@512x32"."""
        name, _, sizes = text.partition("@")
        size, _, batch = sizes.partition("x")
        return cls(name, int(size or 0), int(batch or 0))


class Recorded(NamedTuple):
    """A launch as it was made: the kernel, its programs, its numbers by name, and bytes of its tensors, each once."""

    launch: Launch
    grid: tuple[int, ...]
    numbers: tuple[tuple[str, int], ...]
    bytes: int

    @property
    def kernel(self) -> str:
        return self.launch.kernel.fn.__name__

    @property
    def operation(self) -> str:
        """The folder that the kernel stands in, and its name: "window_attention _forward_whole"."""
        return f"{self.launch.kernel.fn.__module__.split('.')[1]} {self.kernel}"


@dataclass
class Step:
    """All that a step launches; what is outside of our kernels as bytes and kernels, by what it is."""

    model: str
    kind: str
    image_size: int = 0
    batch: int = 0
    launches: Counter[Recorded] = field(default_factory=Counter)
    outside: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))

    @property
    def name(self) -> str:
        return f"{self.model} {self.image_size} px, batch {self.batch}, {self.kind}"

    def variants(self) -> list[Launch]:
        """What has to be compiled, in the order in which it is launched."""
        return list(dict.fromkeys(r.launch for r in self.launches))


class Recorder(Meter):
    """Notes every launch, and what PyTorch's own operators move."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def launched(self, kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict) -> None:
        super().launched(kernel, grid, arguments, options)
        if self.counting:
            named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
            numbers = tuple((n, v) for n, v in named.items() if isinstance(v, int))
            launch = launch_of(kernel, arguments, options)
            self.step.launches[Recorded(launch, tuple(grid), numbers, touched(arguments))] += 1

    def _count(self, function, args, kwargs, out) -> None:
        bytes_before, kernels_before = self.bytes, self.kernels
        super()._count(function, args, kwargs, out)
        entry = self.step.outside[_group(function._schema.name)]
        entry[0] += self.bytes - bytes_before
        entry[1] += self.kernels - kernels_before


def record(model: Model, kind: str) -> Step:
    """The launches of a step, "training" or "inference", with the state of the optimizer there already."""
    made = import_module("models.benchmark")
    size = model.image_size or import_module("models.factory").compose_model(model.name).image_size
    batch = model.batch or (DEFAULT_BATCH if size <= SMALL_IMAGE else LARGE_BATCH)
    step = Step(model.name, kind, size, batch)
    with Recorder(step) as meter, launching(meter):
        meter.counting = False
        run = getattr(made.Steps(model.name, None, batch, size, "cpu"), kind)
        if kind == "training":
            run()  # makes the optimizer's state
        meter.counting = True
        run()
    return step


def _group(name: str) -> str:
    name = name.removeprefix("aten::")
    if name in PRODUCTS:
        return "products"
    return "optimizer" if "adam" in name or name.startswith("_foreach") else "glue"
