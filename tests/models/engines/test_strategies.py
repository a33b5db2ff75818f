"""What `trainer.strategy` and its keys become, and batch norms over two processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import nn

from conf.errors import UserError
from conf.resolvers import slurm
from conf.settings import check_trainer
from models.engines.distributed import Distributed
from models.engines.strategies import engine, several, strategy
from models.engines.sync_norm import SyncNorms
from tests.compositions import compose_once
from tests.models.engines.pairs import pair


@pytest.mark.parametrize(
    ("settings", "many"),
    [
        ({}, False),
        ({"devices": 2}, True),
        ({"devices": "2"}, True),
        ({"devices": "auto", "accelerator": "cpu"}, False),
        ({"devices": 1, "num_nodes": 2}, True),
        ({"devices": [0, 1]}, True),
        ({"devices": "0,"}, False),
        ({"devices": "0,1"}, True),
        ({"devices": None}, False),
    ],
)
def test_several_devices(settings, many):
    assert several(settings) is many
    assert isinstance(strategy(settings), Distributed) is many


def test_what_is_lightnings_stays_lightnings():
    settings, spread = engine(compose_once(["trainer=default"])[0].trainer)
    assert spread == {"plugins": []}
    assert not {"timeout", "static_graph", "gradient_compression"} & set(settings["trainer"])
    assert strategy({"strategy": "deepspeed", "devices": 2}) is None


def test_keys_reach_ddp():
    cfg = compose_once(["trainer=ddp_cpu", "trainer.timeout=5", "trainer.static_graph=true"])[0]
    _, spread = engine(OmegaConf.merge(cfg.trainer, {"sync_batchnorm": True, "gradient_compression": "fp16"}))
    chosen = spread["strategy"]
    assert chosen._timeout.total_seconds() == 5 and chosen._ddp_kwargs == {"static_graph": True}
    assert chosen.compression == "fp16" and [type(plugin) for plugin in spread["plugins"]] == [SyncNorms]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout": 0}, r"trainer: timeout must be a number of seconds above 0, got 0; set trainer.timeout=600"),
        ({"timeout": True}, "timeout must be a number of seconds above 0, got True"),
        ({"gradient_compression": "int8"}, "must be one of fp16, bf16, powersgd or null, got 'int8'"),
        ({"sync_batchnorm": "yes"}, "sync_batchnorm must be true or false, got 'yes'"),
        ({"static_graph": 1}, "static_graph must be true or false, got 1"),
        (
            {"strategy": "fsdp", "precision": "16-mixed"},
            "cannot scale the loss.*set trainer.precision=bf16",
        ),
        ({"strategy": "fsdp", "static_graph": True}, "static_graph is of strategy=ddp, got True with fsdp"),
    ],
)
def test_keys_that_are_wrong(settings, message):
    with pytest.raises(UserError, match=message):
        check_trainer(settings)


def test_slurm_says_how_many(monkeypatch):
    for name in ("SLURM_NNODES", "SLURM_JOB_NUM_NODES", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    assert slurm("nodes") == 1 and slurm("tasks_per_node") == "auto"
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NNODES", "4")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "8(x4)")
    trainer = compose_once(["trainer=slurm"])[0].trainer
    assert (trainer.num_nodes, trainer.devices, trainer.strategy) == (4, 8, "ddp")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "8(x3),4")
    with pytest.raises(UserError, match=r"every node must have as many tasks, got 8\(x3\),4"):
        slurm("tasks_per_node")


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    ).double()


def norms_of_two(folder: Path) -> None:
    """Batches of five and three images: outputs, gradients and averages are those of one batch of eight."""
    whole, shared = _network(), _network()
    held = shared[1]
    SyncNorms().apply(shared)
    assert shared[1] is held and list(shared.state_dict()) == list(whole.state_dict())
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 9, 9, generator=generator, dtype=torch.float64)
    part = slice(0, 5) if dist.get_rank() == 0 else slice(5, 8)
    expected, found = whole(images), shared(images[part])
    torch.testing.assert_close(found, expected[part])
    expected.square().sum().backward()
    found.square().sum().backward()
    for (name, value), own in zip(whole.named_parameters(), shared.parameters(), strict=True):
        dist.all_reduce(own.grad)
        torch.testing.assert_close(own.grad, value.grad, msg=name)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], value, msg=name)
    SyncNorms().revert(shared)
    assert type(shared[1]) is nn.BatchNorm2d


@pytest.mark.full
def test_synced_norms_are_those_of_the_whole_batch(tmp_path):
    pair(tmp_path, f"{__name__}:norms_of_two")
