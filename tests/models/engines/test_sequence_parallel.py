"""Two processes that share the rows of a map compute what one computes, and tell each other no more than states."""

import json
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from conf.errors import UserError
from models import create_model
from models.engines import sequence_parallel
from models.engines.sequence_parallel import SequenceParallel, check, share_tokens
from tests.faults.programs import TINY, run
from tests.models.engines.pairs import pair

SMALL = {"num_classes": 5, "dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}


def model(attention="linear", **options):
    torch.manual_seed(0)
    return create_model("vit_32px", attention=attention, **SMALL | {"class_token": False} | options)


class Meeting:
    """All-reduce of threads in place of processes; `sent` has the numbers of each call of the first."""

    def __init__(self, processes):
        self.given, self.sent = [None] * processes, []
        self.barrier, self.here = threading.Barrier(processes, timeout=120), threading.local()

    def exchanged(self, x):
        if self.here.rank == 0:
            self.sent.append(x.numel())
        self.given[self.here.rank] = x.detach()
        self.barrier.wait()
        total = sum(self.given[1:], self.given[0])
        self.barrier.wait()
        return total

    def all_reduce(self, x):
        meeting = self

        class Reduced(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return meeting.exchanged(x)

            @staticmethod
            def backward(ctx, gradient):
                return meeting.exchanged(gradient)

        return Reduced.apply(x)


def spread(made, images, labels, processes, monkeypatch):
    """Logits, gradients averaged over the processes, and what they told each other, of `processes` copies."""
    meeting, found = Meeting(processes), [None] * processes
    monkeypatch.setattr(sequence_parallel, "_spread", lambda: processes)
    monkeypatch.setattr(sequence_parallel.dist, "get_rank", lambda: meeting.here.rank)
    monkeypatch.setattr(sequence_parallel, "all_reduce", meeting.all_reduce)
    models = [made() for _ in range(processes)]
    for one in models:
        share_tokens(object.__new__(SequenceParallel), SimpleNamespace(model=one), processes)

    def compute(rank):
        meeting.here.rank = rank
        logits = models[rank](images)
        nn.functional.cross_entropy(logits, labels).backward()
        found[rank] = (logits.detach(), {name: p.grad for name, p in models[rank].named_parameters()})

    threads = [threading.Thread(target=compute, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gradients = {name: sum(one[1][name] for one in found) / processes for name in found[0][1]}
    return [one[0] for one in found], gradients, meeting.sent


@pytest.mark.parametrize(("attention", "processes"), [("linear", 2), ("linear", 4), ("hedgehog", 2), ("galerkin", 2)])
def test_processes_compute_what_one_computes(attention, processes, monkeypatch):
    """float64: what differs is the order of the sums over tokens."""
    images, labels = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 3, 4])
    whole = model(attention).double()
    logits = whole(images)
    nn.functional.cross_entropy(logits, labels).backward()
    parts, gradients, sent = spread(lambda: model(attention).double(), images, labels, processes, monkeypatch)
    for part in parts:
        torch.testing.assert_close(part, logits.detach(), rtol=1e-10, atol=1e-12)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-12, msg=name)
    if attention == "linear":  # per image and layer M·D·(D + 1), once forward and once backward, and the mean: B·C
        heads, width = 2, 8
        assert sorted(sent) == sorted([3 * heads * width * (width + 1)] * 4 + [3 * 16] * 2)


def apart(found, expected):
    """The norm of what differs over the norm of all."""
    whole = torch.cat([value.flatten() for value in expected])
    return float((torch.cat([value.flatten() for value in found]) - whole).norm() / whole.norm())


def rows_of_two(folder):
    """Logits and gradients of real processes: the order of the sums over tokens is all that differs."""
    images, labels = torch.linspace(-2, 2, 4 * 3 * 32 * 32).sin().view(4, 3, 32, 32), torch.arange(4)
    for attention in ("linear", "hedgehog", "galerkin"):
        for dtype, rounding in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            whole, shared = model(attention).to(dtype), model(attention).to(dtype)
            share_tokens(object.__new__(SequenceParallel), SimpleNamespace(model=shared), 2)
            expected, found = whole(images.to(dtype)), shared(images.to(dtype))
            for logits in (expected, found):
                nn.functional.cross_entropy(logits, labels).backward()
            for weight in shared.parameters():
                dist.all_reduce(weight.grad)
                weight.grad /= 2
            gradients = [[weight.grad for weight in one.parameters()] for one in (shared, whole)]
            far = apart([found.detach()], [expected.detach()]), apart(*gradients)
            assert max(far) < rounding, (attention, dtype, far)


@pytest.mark.full
def test_two_processes_differ_by_rounding_alone(tmp_path):
    pair(tmp_path, f"{__name__}:rows_of_two")


def test_alone_it_is_the_same_model():
    images = torch.randn(2, 3, 32, 32)
    shared = model()
    share_tokens(object.__new__(SequenceParallel), SimpleNamespace(model=shared), 1)
    assert torch.equal(shared(images), model()(images))
    assert list(shared.state_dict()) == list(model().state_dict())


@pytest.mark.parametrize(
    ("made", "processes", "message"),
    [
        (lambda: model(class_token=True), 2, "a class token is of no rows of the map"),
        (lambda: model(), 3, "3 processes cannot share the 4 rows of the map evenly"),
        (lambda: model("softmax"), 2, "stages.1.blocks.0.attn.core must have a state, got SoftmaxCore"),
        (lambda: model("galerkin", positions=True), 2, "must have a state, got GalerkinCore"),
        (lambda: model("focused_linear"), 2, "core must have a state, got FocusedLinearCore"),
        (lambda: model(layout="window"), 2, "attn must be attention on the whole map without other parts"),
        (lambda: model(gate="se"), 2, "must compute every token by itself, got"),
        (lambda: model(pool="simpool"), 2, "(pooling) looks at all tokens"),
        (lambda: create_model("coatnet_32px", num_classes=5), 2, "the backbone must be a ViT, got CoAtNet"),
    ],
)
def test_what_mixes_tokens_otherwise_is_refused_by_name(made, processes, message):
    with pytest.raises(UserError, match=r"^trainer: sequence_parallel: ") as error:
        check(made(), processes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("task", "message"),
    [({"token_head": 1}, "label maps (data.token_labels)"), ({"compiled": True}, "leave task.compile out")],
)
def test_a_task_that_needs_all_tokens_is_refused(task, message):
    with pytest.raises(UserError) as error:
        share_tokens(object.__new__(SequenceParallel), SimpleNamespace(model=None, **task), 2)
    assert message in str(error.value)


STATE = (*TINY, "attention=linear", "model.class_token=false", "model.drop_path=0.1", "trainer.max_epochs=1")


@pytest.mark.full
def test_a_run_on_two_processes_is_that_on_one(tmp_path):
    """8 steps in float32, with drop path: the orders of sums differ."""
    from safetensors.torch import load_file

    two = ("trainer=sequence_parallel", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.devices=2")
    status, text = run(tmp_path, *STATE, *two, "run.name=two")
    assert status == 0 and "the tokens of every map are spread over 2 processes" in text, text
    assert run(tmp_path, *STATE, "run.name=one")[0] == 0
    one, two = (load_file(tmp_path / f"outputs/{name}/checkpoints/last/model.safetensors") for name in ("one", "two"))
    for name, value in one.items():  # Adam divides by gradients near zero, of which rounding is a larger part
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert apart([two[name] for name in one], one.values()) < 1e-6
    figures = [json.loads((tmp_path / f"outputs/{name}/metrics.json").read_text()) for name in ("one", "two")]
    assert figures[0]["val/top1"] == figures[1]["val/top1"]
    assert abs(figures[0]["val/loss"] - figures[1]["val/loss"]) < 1e-6
