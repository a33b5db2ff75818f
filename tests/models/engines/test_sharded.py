"""FSDP gives what data parallelism and one process give, and its checkpoints are read by each of them."""

import signal
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from conf.errors import UserError
from models import create_model
from models.checkpoints import load_weights
from models.checkpoints.format.directory import read_manifest
from models.engines.blocks import blocks_of
from models.engines.sharded import clip, share
from tests.faults.programs import TINY, Program, run, start
from tests.models.engines.pairs import pair

SMALL = {"dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "num_classes": 4}
COMMON = (*TINY, "data.workers=0", "trainer.max_epochs=2", "run.name=a", "augment=none")
SGD = ("optimizer=sgd", "optimizer.lr=0.05", "trainer.gradient_clip_val=0.5", "model.drop_path=0")
ENGINES = {
    "one": ("trainer=cpu", "data.batch_size=16"),
    "ddp": ("trainer=ddp_cpu", "data.batch_size=8"),
    "fsdp": ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=8"),
}
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
    if engine == "one":
        return [start(folder, *arguments, before=STOP.format(rank=0, stop=stop))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(folder, *arguments, before=STOP.format(rank=rank, stop=stop), env=places | {"LOCAL_RANK": str(rank)})
        for rank in range(2)
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
    weights = {engine: done(tmp_path / engine, engine, *optimizer) for engine in ENGINES}
    found = {engine: difference(weights[engine], weights["one"]) for engine in ("ddp", "fsdp")}
    print(found)
    assert max(found.values()) < 1e-6
    averaged = load_weights(tmp_path / "one/outputs/a/checkpoints/last", ema=True)
    assert difference(load_weights(tmp_path / "fsdp/outputs/a/checkpoints/last", ema=True), averaged) < 1e-6


@pytest.mark.full
def test_a_run_goes_from_engine_to_engine(tmp_path):
    """FSDP, one process, DDP, FSDP: no step is lost, and the end is that of a run that one process has made."""
    expected = done(tmp_path / "whole", "one", *SGD)
    for engine, stop in (("fsdp", 2), ("one", 5), ("ddp", 9), ("fsdp", 12)):
        done(tmp_path / "parts", engine, *SGD, stop=stop)
        folder = tmp_path / "parts/outputs/a/checkpoints/last"
        assert read_manifest(folder)["step"] == stop + 1
        assert (folder / "model-00001-of-00002.safetensors").exists() is (engine == "fsdp")
    assert difference(done(tmp_path / "parts", "fsdp", *SGD), expected) < 1e-6
    status, text = run(tmp_path / "parts", "ckpt=outputs/a/checkpoints/last", program="eval.py")
    assert status == 0, text
    assert not list((tmp_path / "parts/outputs/a/checkpoints").glob(".*"))
    assert len(load_file(folder / "ema-00002-of-00002.safetensors")) > 1


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
