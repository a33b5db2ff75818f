"""FSDP gives what data parallelism and one process give, and its checkpoints are read by each of them."""

import signal
import socket
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from conf.errors import UserError
from models import create_model
from models.callbacks.writer import Writer
from models.checkpoints import load_weights
from models.checkpoints.format.directory import MODEL, read_manifest, verify
from models.checkpoints.format.door import CorruptCheckpoint
from models.checkpoints.format.parts import part_name
from models.checkpoints.format.tensors import save_tensors
from models.engines import pieces
from models.engines.blocks import blocks_of
from models.engines.sharded import clip, share
from models.engines.shares import Shares, Stored
from tests.faults.programs import TINY, Program, run, start
from tests.models.engines.pairs import pair

SMALL = {"dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "num_classes": 4}
COMMON = (*TINY, "data.workers=0", "trainer.max_epochs=2", "run.name=a", "augment=none")
SGD = ("optimizer=sgd", "optimizer.lr=0.05", "trainer.gradient_clip_val=0.5", "model.drop_path=0")
ENGINES = {
    "one": ("trainer=cpu", "data.batch_size=16"),
    "ddp": ("trainer=ddp_cpu", "data.batch_size=8"),
    **{
        name: ("trainer=fsdp", "trainer.accelerator=cpu", f"trainer.devices={count}", f"data.batch_size={16 // count}")
        for name, count in (("fsdp", 2), ("fsdp on 4", 4), ("fsdp on 1", 1))
    },
}
PROCESSES = {"one": 1, "ddp": 2, "fsdp": 2, "fsdp on 4": 4, "fsdp on 1": 1}
STOP = """
import os, signal
from pytorch_lightning.utilities import rank_zero_only
from models.tasks.base import Task
rank_zero_only.rank = {rank}
real = Task.on_train_batch_start
def hook(self, batch, batch_idx):
    if self.global_step == {stop}:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(self, batch, batch_idx)
Task.on_train_batch_start = hook
"""


def programs(folder: Path, engine: str, *arguments: str, stop: int = -1) -> list[Program]:
    """The processes of a run, as srun starts them; stopped before that step is taken."""
    arguments = (*COMMON, *ENGINES[engine], "trainer.precision=32-true", *arguments)
    if (count := PROCESSES[engine]) == 1:
        return [start(folder, *arguments, before=STOP.format(rank=0, stop=stop))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(folder, *arguments, before=STOP.format(rank=rank, stop=stop), env=places | {"LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def done(folder: Path, engine: str, *arguments: str, stop: int = -1) -> dict[str, Tensor]:
    """The weights that a run ends with."""
    for program in programs(folder, engine, *arguments, stop=stop):
        assert program.wait() == (0 if stop < 0 else signal.SIGTERM + 60), program.text
    return load_weights(folder / "outputs/a/checkpoints/last")


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The norm of what differs over the norm of all weights."""
    assert found.keys() == expected.keys()
    apart, whole = (
        sum(float(value.double().square().sum()) for value in values)
        for values in ((found[name] - value for name, value in expected.items()), expected.values())
    )
    return (apart / whole) ** 0.5


def shares_of_two(folder: Path) -> None:
    """Three clipped steps, of a model with a weight that is one number, against the whole batch on one process."""
    torch.manual_seed(0)
    options = SMALL | {"image_size": 32, "head": "tversky"}
    whole = create_model("vit_32px", **options)
    torch.manual_seed(0)
    shared = create_model("vit_32px", **options)
    assert any(weight.dim() == 0 for weight in shared.parameters())
    names = list(shared.state_dict())
    share(shared, init_device_mesh("cpu", (2,)))
    assert list(shared.state_dict()) == names
    alone = [weight for weight in shared.parameters() if weight.dim() == 0]
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for model in (whole, shared)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        images = torch.randn(8, 3, 32, 32, generator=generator)
        labels = torch.randint(4, (8,), generator=generator)
        nn.functional.cross_entropy(whole(images), labels).backward()
        part = slice(dist.get_rank(), None, 2)
        nn.functional.cross_entropy(shared(images[part]), labels[part]).backward()
        for weight in alone:
            dist.all_reduce(weight.grad)
            weight.grad /= 2
        nn.utils.clip_grad_norm_(whole.parameters(), 0.3)
        clip(optimizers[1], 0.3)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    found = {name: getattr(w, "full_tensor", lambda w=w: w)().detach() for name, w in shared.named_parameters()}
    assert difference(found, {name: weight.detach() for name, weight in whole.named_parameters()}) < 1e-6


def halves_of_two(folder: Path) -> None:
    """Gathered in bf16, kept and added up in 32 bits; loss and gradients are those of autocast, to bf16's rounding."""
    options = {"num_classes": 4, "image_size": 32}
    torch.manual_seed(0)
    whole = create_model("coatnet_32px", **options).eval()  # has batch norms
    torch.manual_seed(0)
    shared = create_model("coatnet_32px", **options).eval()
    share(shared, init_device_mesh("cpu", (2,)), mixed=True)
    norms = [part for part in shared.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms and not any(isinstance(weight, DTensor) for norm in norms for weight in norm.parameters())
    kinds = []
    shared.head.register_forward_hook(lambda head, given, logits: kinds.append(next(head.parameters()).dtype))
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(8, 3, 32, 32, generator=generator), torch.randint(4, (8,), generator=generator)
    part = slice(dist.get_rank(), None, 2)
    losses = []
    for model, rows in ((whole, slice(None)), (shared, part)):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(nn.functional.cross_entropy(model(images[rows]).float(), labels[rows]))
        losses[-1].backward()
    loss = losses[1].detach().clone()
    dist.all_reduce(loss)
    assert abs(loss / 2 - losses[0].detach()) < 2**-8 * losses[0]
    assert kinds == [torch.bfloat16]
    weights = dict(shared.named_parameters())
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    for weight in weights.values():
        if not isinstance(weight, DTensor):
            dist.all_reduce(weight.grad)
            weight.grad /= 2
    found = {name: getattr(w.grad, "full_tensor", lambda w=w: w.grad)() for name, w in weights.items()}
    far = difference(found, {name: weight.grad for name, weight in whole.named_parameters()})
    assert far < 2**-6


@pytest.mark.full
def test_shares_travel_in_half_of_the_bits(tmp_path):
    pair(tmp_path, f"{__name__}:halves_of_two")


def checkpoint_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """What Lightning has of a run."""
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    return {
        **{"epoch": 0, "global_step": 1, "loops": {}, "callbacks": {}, "lr_schedulers": []},
        **{"state_dict": weights, "optimizer_states": [optimizer.state_dict()]},
    }


def made(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of shares, with a weight that is one number, after a step."""
    torch.manual_seed(seed)
    model = create_model("vit_32px", **SMALL, image_size=32, head="tversky")
    share(model, init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def saves_of_two(folder: Path) -> None:
    """A save is written beside training, of what was there when it began; shares are read as shares."""
    (model, optimizer), shares, writer, go = made(0), Shares(), Writer(), threading.Event()
    before = {name: getattr(w, "full_tensor", w.clone)() for name, w in model.state_dict().items()}
    moments = [s["exp_avg"].to_local().clone() for s in optimizer.state.values() if isinstance(s["exp_avg"], DTensor)]
    new = pieces.NewFile
    pieces.NewFile = lambda path: new(path) if go.wait(60) else None
    shares.save(checkpoint_of(model, optimizer), folder / "step-00000001", writer)
    assert writer.busy
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    go.set()
    writer.wait()
    assert writer.error is None and not list(folder.glob(".writing-*"))
    whole = load_weights(folder / "step-00000001")
    assert whole.keys() == before.keys() and all(torch.equal(whole[name], before[name]) for name in whole)
    stored = Stored.at(folder / "step-00000001")
    state = stored.state()
    assert all(value.is_meta for value in state["state_dict"].values())
    other, empty = made(1)
    shares.load_model(other, stored, MODEL)
    for name, value in other.state_dict().items():
        assert torch.equal(getattr(value, "full_tensor", value.clone)(), before[name]), name
    shares.load_optimizer(empty, state["optimizer_states"][0], "optimizer_states.0", stored)
    found = [s["exp_avg"].to_local() for s in empty.state.values() if isinstance(s["exp_avg"], DTensor)]
    assert moments and all(map(torch.equal, found, moments))
    for _ in range(2):  # what stands there is not written again
        places = [file.stat().st_ino for file in sorted(stored.folder.glob("*.safetensors"))]
        shares.save(checkpoint_of(model, optimizer), stored.folder, None)
    assert [file.stat().st_ino for file in sorted(stored.folder.glob("*.safetensors"))] == places
    files = verify(stored.folder)["files"]
    again = folder / "again" / stored.folder.name
    shares.save(checkpoint_of(model, optimizer), again, None)
    assert read_manifest(again)["files"] == files
    with pytest.raises(CorruptCheckpoint, match=r"the shares in .* cannot be read"):
        shares.load({"nobody": torch.ones(2)}, stored, MODEL)


@pytest.mark.full
def test_shares_are_written_beside_training_and_read_as_shares(tmp_path):
    pair(tmp_path, f"{__name__}:saves_of_two")


def test_parts_without_offsets_are_read_in_slices(tmp_path):
    """As checkpoints had them before they were written by PyTorch's distributed checkpoint."""
    for rank, rows in enumerate((3, 0, 2)):
        part = {"weight": torch.full((rows, 2), float(rank)), **({"bias": torch.ones(1)} if rank == 0 else {})}
        save_tensors(part, tmp_path / part_name(MODEL, rank, 3))
    values = {"weight": torch.zeros(5, 2), "bias": torch.zeros(1)}
    names = [part_name(MODEL, rank, 3) for rank in range(3)]
    with pytest.warns(UserWarning, match="in a single process"):
        dcp.load(values, storage_reader=pieces.PartReader(tmp_path, names))
    assert values["weight"][:, 0].tolist() == [0, 0, 0, 2, 2] and values["bias"].tolist() == [1]


@pytest.mark.full
def test_shares_learn_what_a_whole_model_learns(tmp_path):
    pair(tmp_path, f"{__name__}:shares_of_two")


def test_what_looks_at_whole_weights_is_refused():
    model = create_model("vit_32px", **SMALL, reparam="sigma")
    with pytest.raises(UserError, match=r"fsdp shares every weight, got reparam=sigma, .*; set trainer=ddp"):
        share(model, None)


def test_blocks_of_ours_and_of_others():
    import timm

    with torch.device("meta"):
        ours = create_model("swin_tiny")
        vit = timm.create_model("vit_tiny_patch16_224")
        swin = timm.create_model("swin_tiny_patch4_window7_224")
    assert [type(block).__name__ for block in blocks_of(ours)] == ["Block"] * 12
    assert blocks_of(vit) == list(vit.blocks)
    assert {type(block).__name__ for block in blocks_of(swin)} == {"SwinTransformerBlock"} and len(
        blocks_of(swin)
    ) == 12


def test_blocks_that_have_a_weight_in_common_are_left_out():
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3))
    blocks[2][0].weight = blocks[0][0].weight
    assert blocks_of(nn.Sequential(blocks)) == [blocks[1]]


@pytest.mark.full
@pytest.mark.parametrize("optimizer", [SGD, ("optimizer=sgd", "optimizer.lr=0.05", "model.drop_path=0")])
def test_three_engines_learn_the_same(tmp_path, optimizer):
    """Sums in another order are all that differs."""
    weights = {engine: done(tmp_path / engine, engine, *optimizer) for engine in ("one", "ddp", "fsdp")}
    found = {engine: difference(weights[engine], weights["one"]) for engine in ("ddp", "fsdp")}
    print(found)
    assert max(found.values()) < 1e-6
    averaged = load_weights(tmp_path / "one/outputs/a/checkpoints/last", ema=True)
    assert difference(load_weights(tmp_path / "fsdp/outputs/a/checkpoints/last", ema=True), averaged) < 1e-6


@pytest.mark.full
def test_a_run_goes_from_engine_to_engine(tmp_path):
    """And from some processes to more and fewer: no step is lost, and the end is that of one process alone."""
    expected = done(tmp_path / "whole", "one", *SGD)
    for engine, stop in (("fsdp", 2), ("one", 5), ("ddp", 8), ("fsdp on 4", 11)):
        done(tmp_path / "parts", engine, *SGD, stop=stop)
        folder = tmp_path / "parts/outputs/a/checkpoints/last"
        assert read_manifest(folder)["step"] == stop + 1
        files = len(list(folder.glob("model*.safetensors")))
        assert files == (PROCESSES[engine] if engine.startswith("fsdp") else 1)
    assert len(load_file(folder / "ema-00004-of-00004.safetensors")) > 1
    assert difference(done(tmp_path / "parts", "fsdp on 1", *SGD), expected) < 1e-6
    status, text = run(tmp_path / "parts", "ckpt=outputs/a/checkpoints/last", program="eval.py")
    assert status == 0, text
    assert not list((tmp_path / "parts/outputs/a/checkpoints").glob(".*"))


@pytest.mark.full
@pytest.mark.parametrize(
    "arguments",
    [
        ("trainer.precision=bf16-mixed", "task.gradient_checkpointing=true"),
        ("trainer.accumulate_grad_batches=2", "freeze=[stem]", "freeze_epochs=1"),
        ("head=tversky", "attention=moh", "data.source.val_images=57", "trainer.sync_batchnorm=true"),
    ],
)
def test_what_else_a_run_may_have(tmp_path, arguments):
    done(tmp_path, "fsdp", *arguments)
