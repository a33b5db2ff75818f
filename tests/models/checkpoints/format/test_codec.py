"""Every state that the codec takes comes back equal; everything else is refused while saving."""

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from timm.scheduler import create_scheduler_v2

from models.checkpoints.format.codec import decode, encode, plain_tensor


def round_trip(value):
    tensors = {}
    text = json.dumps(encode(value, tensors), allow_nan=False)
    return decode(json.loads(text), load(save(tensors)))


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(2**70),
        "text",
        [1, [2.5, "x"], None],
        (1, (2,), [3]),
        {"a": {"b": (1,)}},
        {0: "int", "0": "text", None: 1, (1, 2): [3]},
        {"$tensor": "not a tag"},
        {"$": 1, "b": 2},
        {},
        math.inf,
        0.1,
    ],
)
def test_plain_values_come_back(value):
    back = round_trip(value)
    assert back == value and type(back) is type(value)


def test_types_inside_are_kept():
    back = round_trip({1: (True, 1, 1.0), "s": [()]})
    assert [type(item) for item in back[1]] == [bool, int, float] and back["s"] == [()]
    assert math.isnan(round_trip([float("nan")])[0])
    assert round_trip(OrderedDict(a=1)) == {"a": 1}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.zeros(0, 4),
        torch.randn(3, 5).t(),
        torch.randn(2, 3).bfloat16(),
        torch.tensor([True, False]),
        torch.arange(4),
        torch.tensor([float("nan"), -0.0]),
    ],
)
def test_tensors_come_back_bit_for_bit(tensor):
    back = round_trip({"x": tensor})["x"]
    assert back.dtype == tensor.dtype and back.shape == tensor.shape
    assert torch.equal(back.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_shared_storage_and_equal_paths_are_kept_apart():
    weight = torch.randn(4, 4)
    back = round_trip({"tied": [weight, weight, weight[:2]], 1: torch.zeros(1), "1": torch.ones(1)})
    assert all(torch.equal(a, b) for a, b in zip(back["tied"], [weight, weight, weight[:2]], strict=True))
    assert back[1].item() == 0 and back["1"].item() == 1


def test_channels_last_is_kept():
    tensor = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    back = round_trip(tensor)
    assert torch.equal(back, tensor) and back.stride() == tensor.stride()


def test_saving_copies():
    tensor, tensors = torch.zeros(2), {}
    encode([tensor], tensors)
    tensor += 1
    assert tensors["0"].sum() == 0


class Pair(NamedTuple):
    a: int


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Path("x"), "pathlib.*Path"),
        ({1}, "builtins.set"),
        (np.zeros(2), "numpy.ndarray"),
        (np.float64(1.0), "numpy.float64"),
        (len, "builtin_function_or_method"),
        (torch.float32, "torch.dtype"),
        (Pair(1), "Pair"),
        (b"x", "builtins.bytes"),
    ],
)
def test_other_types_are_refused_with_their_path(value, name):
    with pytest.raises(TypeError, match=rf"the entry 'callbacks.EMA.1' must be a tensor or plain data, got .*{name}"):
        encode({"callbacks": {"EMA": [0, value]}}, {})
    if name != "numpy.ndarray" and name != "builtins.set":
        with pytest.raises(TypeError, match=r"\(key\)"):
            encode({value: 1}, {})


def test_sparse_and_meta_tensors_are_refused():
    for tensor in (torch.eye(3).to_sparse(), torch.empty(2, device="meta")):
        with pytest.raises(TypeError, match="the entry 'w' must be a dense tensor with data"):
            plain_tensor(tensor, "w")


def test_unknown_tags_and_missing_tensors_are_refused():
    for value in ({"$object": "os.system"}, {"$tensor": "gone"}):
        with pytest.raises(ValueError, match="unknown entry in the stored state"):
            decode(value, {})


def test_states_of_optimizers_and_schedules_fit():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule, _ = create_scheduler_v2(optimizer, num_epochs=3, updates_per_epoch=2, step_on_epochs=False)
    chain = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.LinearLR(optimizer), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)],
        [2],
    )
    back = round_trip(optimizer.state_dict())
    assert back["state"].keys() == {0, 1}
    assert torch.equal(back["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert round_trip(schedule.state_dict()) == schedule.state_dict()
    assert round_trip(chain.state_dict()).keys() == chain.state_dict().keys()
