"""Our writer of safetensors writes the bytes of theirs, and hashes them on the way."""

import hashlib
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoints.format.tensors import save_tensors

KINDS = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32),
    *(torch.float64, torch.complex64),
]


def some():
    values = {f"{kind}".removeprefix("torch."): torch.arange(6).to(kind).reshape(2, 3) for kind in KINDS}
    odd = {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "größe": torch.tensor([True]), 'a"b': torch.ones(5)}
    return values | odd


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_those_of_safetensors(tmp_path, metadata):
    entry = save_tensors(some(), tmp_path / "ours", metadata)
    save_file(some(), tmp_path / "theirs", metadata)
    ours = (tmp_path / "ours").read_bytes()
    assert ours == (tmp_path / "theirs").read_bytes()
    assert entry == {"sha256": hashlib.sha256(ours).hexdigest(), "bytes": len(ours)}


def test_nothing_and_views_are_written_too(tmp_path):
    save_tensors({}, tmp_path / "nothing")
    assert load_file(tmp_path / "nothing") == {}
    weight = torch.nn.Parameter(torch.randn(4, 3))
    save_tensors({"w": weight, "same": weight, "turned": weight.t()}, tmp_path / "views")
    back = load_file(tmp_path / "views")
    assert (
        torch.equal(back["w"], weight) and torch.equal(back["turned"], weight.t()) and torch.equal(back["same"], weight)
    )


def test_files_get_the_permissions_of_the_umask(tmp_path):
    (tmp_path / "other").touch()
    save_tensors({"w": torch.zeros(1)}, tmp_path / "ours")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "other")}
    assert len(modes) == 1


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"'w' must have a type of safetensors, got torch\.complex128"):
        save_tensors({"w": torch.zeros(1, dtype=torch.complex128)}, tmp_path / "a")
    with pytest.raises(FileExistsError):
        (tmp_path / "b").touch()
        save_tensors({}, tmp_path / "b")
