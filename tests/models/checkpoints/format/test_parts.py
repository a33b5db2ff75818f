"""Tensors that several processes have written into one checkpoint."""

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoints.format.door import CorruptCheckpoint
from models.checkpoints.format.parts import has, part_name, parts_of, read_heads, read_parts

NAME = "model.safetensors"


def written(folder, *parts):
    names = [part_name(NAME, rank, len(parts)) for rank in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    return names


def test_parts_are_joined_in_the_order_of_processes(tmp_path):
    first = {"weight": torch.zeros(2, 3), "bias": torch.ones(1), "scale": torch.tensor(5.0)}
    names = written(tmp_path, first, {"weight": torch.ones(1, 3)}, {"weight": torch.full((1, 3), 2.0)})
    assert names[0] == "model-00001-of-00003.safetensors"
    found = read_parts(tmp_path, ["config.json", *reversed(names)], NAME)
    assert found["weight"][:, 0].tolist() == [0, 0, 1, 2]
    assert (found["bias"].tolist(), found["scale"].item()) == ([1.0], 5.0)
    assert read_heads(tmp_path, NAME).shapes == {"weight": (4, 3), "bias": (1,), "scale": ()}
    assert has(tmp_path, NAME) and not has(tmp_path, "ema.safetensors")


def test_one_file_is_read_as_ever(tmp_path):
    save_file({"weight": torch.arange(3)}, tmp_path / NAME)
    assert read_parts(tmp_path, [NAME], NAME)["weight"].tolist() == [0, 1, 2]
    assert read_heads(tmp_path, NAME).shapes == {"weight": (3,)}
    assert parts_of(["ema-00001-of-00002.safetensors", "model-1-of-2.safetensors"], NAME) == []
    with pytest.raises(CorruptCheckpoint, match=r"ema\.safetensors"):
        read_parts(tmp_path, [NAME], "ema.safetensors")


def test_parts_that_do_not_fit(tmp_path):
    names = written(tmp_path, {"weight": torch.zeros(2, 3)}, {"weight": torch.zeros(2, 4)})
    with pytest.raises(CorruptCheckpoint, match=r"the parts of weight in .* do not fit"):
        read_parts(tmp_path, names, NAME)
