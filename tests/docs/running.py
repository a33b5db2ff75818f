"""What a page tells to type, done here: commands in this process, small, in a copy of the checkout.

Settings that make a command small stand behind its own; folders of data and files of weights that a page only names
are made. What is printed is what a reader would see.
"""

import contextlib
import io
import os
import runpy
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.docs.pages import Block, blocks, environment, flat, replaced, words

SMALL = (
    "trainer.accelerator=cpu", "trainer.devices=1", "trainer.strategy=auto", "trainer.precision=32-true",
    "trainer.num_nodes=1", "data.workers=0", "data.batch_size=4",
)  # fmt: skip
SHORT = (
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "logger=none",
    "global_batch=null",
)
# models that train at 32 pixels in place of larger ones of their family, unless a block shows what the command says
REDUCED = {"swin_tiny": "swin_32px", "vit_small": "vit_32px", "vit_tiny": "vit_32px"}
LOOKING = ("--help", "--cfg", "--info")
IMAGES, IMAGENET = "/path/to/images", "/data/imagenet"


def run_page(page: str) -> None:
    """Every block of a page, in order, in the working directory.

    Raises:
        AssertionError: a command ends otherwise than the page says; the message has its block and its output.
    """
    names: dict[str, Any] = {"__name__": "page"}
    for block in map(replaced, blocks(page)):
        for given in block.marked("given "):
            make(*given.split(" of "))
        if block.marked("only read, ") or block.marked("file "):
            continue
        if block.language == "python":
            _python(block, names)
        elif block.language == "console":
            _console(block)
        elif block.marked("says so"):
            assert flat(block.text) in flat(names["said"]), f"{block.where}: the code above prints:\n{names['said']}"


def _python(block: Block, names: dict[str, Any]) -> None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            exec(compile(block.text, block.where, "exec"), names)
    except Exception:
        raise AssertionError(f"{block.where}: {traceback.format_exc()}") from None
    names["said"] = said.getvalue()


def _console(block: Block) -> None:
    wanted = int((block.marked("status ") or ["0"])[0])
    said = ""
    for command in block.commands:
        status, output = run(command, block)
        assert status == wanted, f"{block.where}: status {status}, not {wanted}: {command}\n{output}"
        said += f"\n{output}"
    if block.marked("says so") or wanted:
        assert block.shown in flat(said), f"{block.where}: not what the page shows:\n{said}"


def run(command: str, block: Block) -> tuple[int, str]:
    """Exit status, and all that a command prints."""
    program, *rest = words(command)
    if program in ("source", "cd"):
        return 0, ""
    assert program == "python", f"{block.where}: no way to run {command!r}; mark the block"
    module = rest[0] == "-m"
    target, given = rest[1 if module else 0], rest[2 if module else 1 :]
    if target in ("train.py", "eval.py"):
        given = [local(word) for word in given] + _small(target, given, block)
    if target == "train.py" and not block.marked("status "):
        given = [_reduced(word) for word in given]
    with _as_typed(target, given, environment(command)) as said:
        try:
            if module:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(target, run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            status = 1
            traceback.print_exc()
    return status, said.getvalue()


@contextlib.contextmanager
def _as_typed(target: str, given: list[str], variables: dict[str, str]) -> Iterator[io.StringIO]:
    """The process as a shell would start it; gives what is printed, errors included."""
    said, before = io.StringIO(), (sys.argv, dict(os.environ))
    sys.argv = [target, *given]
    os.environ.pop("VISION_ZOO_RUN_NAME", None)
    os.environ.update(variables)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield said
    finally:
        sys.argv = before[0]
        os.environ.clear()
        os.environ.update(before[1])


def _small(target: str, given: list[str], block: Block) -> list[str]:
    """The settings of the test for one command."""
    if any(word.startswith(LOOKING) for word in given) or given[:1] in (["list"], ["doctor"], ["probe=benchmark"]):
        return []
    added = [word for mark in block.marked("add ") for word in mark.split()]
    if block.marked("status ") or "probe=loader" in given:  # which has no model and no batch
        return added
    if target == "train.py":
        return [*SMALL, *SHORT, *added]
    return ["trainer.accelerator=cpu", "data.batch_size=4", "data.workers=0", "+trainer.limit_val_batches=1", *added]


def _reduced(word: str) -> str:
    key, sign, value = word.partition("=")
    return f"{key}{sign}{REDUCED.get(value, value)}" if key == "model" else word


def local(word: str) -> str:
    """A setting whose absolute path is one of the working directory, where `make` has put what it names."""
    key, sign, value = word.partition("=")
    if not value.startswith("/"):
        return word
    path = Path("given" + value).absolute()
    if not path.exists() and value in (IMAGES, IMAGENET):
        make_images(path, 1000 if value == IMAGENET else 2)
    return f"{key}{sign}{path}" if path.exists() else word


def make_images(root: Path, classes: int) -> None:
    """A folder per class with the same few images, of noise."""
    import numpy as np
    from PIL import Image

    names = [f"n{number:08d}" for number in range(classes)]
    source = root.with_name(f"{root.name}.png")
    root.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(source)
    for split, copies in (("train", 1 if classes > 100 else 8), ("val", 1 if classes > 100 else 2)):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for copy in range(copies):
                os.link(source, root / split / name / f"{copy}.png")


def make(file: str, model: str) -> None:
    """A file of weights of `model` in its authors' names, or in the folder `file/` an autoencoder of diffusers."""
    path = Path("given" + file) if file.startswith("/") else Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.endswith("/"):
        return make_autoencoder(path)
    import torch
    from safetensors.torch import save_file

    from models import create_model
    from models.checkpoints import export

    torch.manual_seed(0)
    state = create_model(model).state_dict()
    if path.suffix == ".safetensors":
        return save_file(export(state, model), path)
    torch.save(state if path.suffix == ".pt" else {"model": export(state, model)}, path)


def make_autoencoder(folder: Path) -> None:
    """Stride 8 and 4 channels, as Stable Diffusion's, and very thin."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (4,) * 4, "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
    AutoencoderKL(**blocks, **sizes, scaling_factor=0.18215).save_pretrained(folder)


def hurry() -> None:
    """Runs and evaluations draw nothing, which takes as long as a small run, and time a model for a moment."""
    from models.probes import accuracy
    from models.probes.reading import forward_cost
    from models.runs import sweep_pictures, training

    training.draw_curves = lambda *given: None
    sweep_pictures.draw_comparison = sweep_pictures.draw_pareto = lambda *args: None
    accuracy.charts_of = lambda *given: {}
    forward_cost.SECONDS = 0.01


def main(arguments: list[str]) -> None:
    """Runs pages in this working directory; one line each, and what went wrong."""
    hurry()
    failed = False
    for page in arguments:
        shutil.rmtree("outputs", ignore_errors=True)
        before = time.process_time()
        try:
            run_page(page)
            print(f"{page}: done in {time.process_time() - before:.0f} s of processor time", flush=True)
        except AssertionError as error:
            failed = True
            print(f"{page}: FAILED {error}", flush=True)
    sys.exit(int(failed))
