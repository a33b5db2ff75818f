"""Checkpoints that somebody else sent: read as data, or refused in one sentence; nothing outside is read or written."""

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.errors import UserError
from conf.inputs import images_of
from conf.lists import read_classes, read_list
from data.sources.named import NamedSet
from data.sources.shard_index import index_of
from data.sources.webdataset import expanded
from models.checkpoints import load_weights, read_config, read_manifest, resolve, verify
from models.checkpoints.format.config import check_local, check_stored
from models.checkpoints.format.door import MAX_JSON_BYTES, CorruptCheckpoint, read_head, read_json
from models.runs.evaluated import take_config
from tests.faults.programs import TINY, run


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A checkpoint of ours."""
    folder = tmp_path_factory.mktemp("honest")
    status, text = run(folder, *TINY, "run.name=a", "trainer.max_epochs=1", "trainer.limit_train_batches=2")
    assert status == 0, text
    return (folder / "outputs/a/checkpoints/last").resolve()


@pytest.fixture
def forge(honest, tmp_path):
    """The checkpoint as a stranger would send it: with another configuration, and checksums that fit."""

    def forged(config=None, change=None) -> Path:
        target = tmp_path / "foreign/checkpoints/step-00000002"
        shutil.rmtree(tmp_path / "foreign", ignore_errors=True)
        shutil.copytree(honest, target)
        if config is not None:
            content = json.loads((target / "config.json").read_text())
            config(content)
            (target / "config.json").write_text(json.dumps(content))
        if change is not None:
            change(target)
        manifest = json.loads((target / "manifest.json").read_text())
        manifest["files"] = {name: entry(target / name) for name in manifest["files"]}
        (target / "manifest.json").write_text(json.dumps(manifest))
        return target

    return forged


def entry(file: Path) -> dict:
    if not file.is_file():
        return {"sha256": "0", "bytes": 0}
    return {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}


def put(*keys, value):
    """What sets a key of a configuration."""

    def change(config):
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return change


HOSTILE = {
    "an interpolation in run": (put("run", "model", value="${oc.env:HOME}"), r"config.run.model: interpolations"),
    "a resolver in run": (put("run", "data", value="${class_folders:/}"), r"config.run.data: interpolations"),
    "one where nothing is built": (put("callbacks", "x", value="${a}"), r"config.callbacks.x: interpolations"),
    "one in the trainer": (put("trainer", "precision", value="${a}"), r"config.trainer.precision: interpolations"),
    "run is a list": (put("run", value=["x"]), r"config.run: must be a mapping"),
    "a mapping for a name": (put("run", "model", value={"a": 1}), r"config.run.model: must be one word"),
    "a foreign target": (put("model", "_target_", value="os.system"), r"config.model._target_: must name"),
    "a writer of ours": (put("data", "source", "_target_", value="data.sources.split_file.write_split"), r"offers"),
    "numpy.load": (put("data", "source", "_target_", value="numpy.load"), r"must name something below"),
    "depth": (put("model", "depth", value=10**12), r"config.model.depth: must be at most"),
    "width": (put("model", "dim", value=-(10**9)), r"config.model.dim: must be at most"),
    "pixels": (put("image_size", value=10**6), r"config.image_size: must be at most"),
    "pixels of a transform": (put("data", "eval", "resize", value=10**5), r"config.data.eval.resize: must be at most"),
    "pixels of a list": (put("data", "image_size", value=[32, 10**5]), r"config.data.image_size.1: must be at most"),
    "a crop of nothing": (put("data", "eval", "crop_fraction", value=1e-9), r"config.data.eval.crop_fraction: must be"),
    "a batch": (put("data", "batch_size", value=10**9), r"config.data.batch_size: must be at most"),
    "stages": (put("model", "depths", value=[1] * 5000), r"config.model.depths: must have at most 4096 entries"),
    "files": (put("data", "x", value=[0] * (2**20 + 1)), r"config.data.x: must have at most 1048576 entries"),
    "classes": (put("classes", value=[[1]]), r"config.classes: must be a list of names"),
    "data is a list": (put("data", value=[]), r"config.data: must be a mapping"),
    "source is text": (put("data", "source", value="x"), r"config.data.source: must be a mapping"),
    "task is text": (put("task", value="x"), r"config.task: must be a mapping"),
    "no model": (lambda config: config.pop("model"), r"has no 'model'"),
    "eval is a list": (put("data", "eval", value=[1]), r"cannot be used"),
}


@pytest.mark.case(32)
@pytest.mark.case(33)
@pytest.mark.case(35)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_configuration_is_refused_before_anything_is_built(forge, name):
    change, match = HOSTILE[name]
    with pytest.raises(UserError, match=match):
        take_config([f"ckpt={forge(change)}"])


HUB = {"_target_": "data.sources.huggingface.HuggingFace", "path": "parquet"}


@pytest.mark.case(32)
@pytest.mark.parametrize(
    "source",
    [
        HUB | {"data_files": {"train": "http://127.0.0.1:9/who"}},
        HUB | {"data_files": ["a.parquet", "hf://datasets/x/y.parquet"]},
        HUB | {"data_files": "zip://x::https://y"},
        HUB | {"path": "somebody/images"},
        {"root": "s3://bucket"},
    ],
)
def test_no_address_of_a_stored_configuration_is_asked(forge, source):
    path = forge(put("data", "source", value=source))
    with pytest.raises(UserError, match=r"may only name data of this machine, got .*; give data.source.\w+="):
        take_config([f"ckpt={path}"])
    ((key, value),) = [(key, value) for key, value in source.items() if key != "_target_" and value != "parquet"]
    check_local({"source": source}, {f"data.source.{key}"})  # the user means it
    assert value


@pytest.mark.case(32)
def test_nothing_is_downloaded_or_prepared_where_a_stored_configuration_wants_it():
    data = {"source": {"name": "cifar10", "root": "/x", "download": True, "cache_dir": "/y"}}
    check_local(data)
    assert data["source"] == {"name": "cifar10", "root": "/x", "download": False, "cache_dir": None}


@pytest.mark.case(35)
@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 70 + b"]" * 70,
        b" " * (MAX_JSON_BYTES + 1),
    ],
    ids=["empty", "cut", "no UTF-8", "very deep", "5000 digits", "deep", "large"],
)
def test_json_that_is_none_is_one_sentence(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(CorruptCheckpoint, match=r"^checkpoint: .*x.json"):
        read_json(tmp_path / "x.json")


def header(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


HEADS = {
    "1 TB": struct.pack("<Q", 1 << 40) + b"{}",
    "empty": b"",
    "cut": struct.pack("<Q", 100) + b"{}",
    "no mapping": header(b"[1]"),
    "no shape": header(b'{"a": {"dtype": "F32"}}'),
    "negative": header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}') + b"1234",
    "unknown type": header(b'{"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}') + b"1234",
    "more than there is": header(b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}') + b"1234",
    "text in its place": b"<html>",
}


@pytest.mark.case(35)
@pytest.mark.parametrize("name", HEADS)
def test_tensors_that_are_none_are_one_sentence(forge, name):
    path = forge(change=lambda folder: (folder / "model.safetensors").write_bytes(HEADS[name]))
    with pytest.raises(UserError, match=r"model.safetensors (cannot be read|is no safetensors file), got"):
        load_weights(path)


@pytest.mark.case(35)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_ordinary_files_of_the_folder_are_read(forge, tmp_path, name, kind):
    def change(folder):
        outside = tmp_path / f"outside-{name}"
        (folder / name).replace(outside)
        {
            "link": lambda: (folder / name).symlink_to(outside),
            "pipe": lambda: os.mkfifo(folder / name),
            "folder": (folder / name).mkdir,
        }[kind]()

    if name == "manifest.json":
        path = forge()
        change(path)
    else:
        path = forge(change=change)
    with pytest.raises(UserError, match=r"^checkpoint: "):
        verify(path)
        load_weights(path)
        read_config(path)


@pytest.mark.case(35)
def test_a_pointer_does_not_lead_out_of_its_folder(forge, honest):
    path = forge()
    (path.parent / "last").symlink_to(path.name)
    assert resolve(path.parent / "last") == path
    (path.parent / "best").symlink_to(honest)
    with pytest.raises(UserError, match="best is a link that leads out of its folder"):
        resolve(path.parent.parent)


def test_a_link_inside_a_repository_of_the_hub_is_followed(tmp_path):
    """As Hugging Face's cache has them."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots/abc").mkdir(parents=True)
    (tmp_path / "blobs/1").write_text("{}")
    (tmp_path / "snapshots/abc/config.json").symlink_to("../../blobs/1")
    assert read_json(tmp_path / "snapshots/abc/config.json") == {}
    (tmp_path.parent / "secret.json").write_text("{}")
    (tmp_path / "snapshots/abc/other.json").symlink_to(tmp_path.parent / "secret.json")
    (tmp_path / "snapshots/abc/beside.json").symlink_to("../beside.json")
    (tmp_path / "snapshots/beside.json").write_text("{}")
    for name in ("other.json", "beside.json"):
        with pytest.raises(CorruptCheckpoint, match="leads out of its folder"):
            read_json(tmp_path / "snapshots/abc" / name)


def test_the_heads_of_honest_files_say_what_is_in_them(honest):
    head = read_head(honest / "model.safetensors")
    weights = load_weights(honest)
    assert head.shapes == {name: tuple(value.shape) for name, value in weights.items()}
    assert head.numbers == sum(value.numel() for value in weights.values())
    check_stored(read_config(honest))
    assert read_manifest(honest)["step"] == 2


@pytest.mark.case(32)
@pytest.mark.case(35)
def test_an_evaluation_writes_and_reads_nothing_outside(forge, tmp_path):
    """Links where results go, control characters in names, and words that would be paths."""

    def config(content):
        content["run"] |= {"model": "\x1b]0;owned\x07\x1b[31mred", "data": "../../../escaped"}
        content["data"]["workers"] = 40

    path = forge(config)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "mine.json").write_text("mine")
    (path.parent / "metrics.json").symlink_to(precious / "mine.json")
    (path.parent.parent / "evaluation").symlink_to(precious)
    os.mkfifo(path.parent.parent / "split.csv")
    status, text = run(tmp_path, f"ckpt={path}", "trainer.accelerator=cpu", program="eval.py")
    assert status == 0, text
    assert "\x1b]" not in text and "\x1b[31m" not in text and r"\x1b]0;owned" in text
    assert os.listdir(precious) == ["mine.json"] and (precious / "mine.json").read_text() == "mine"
    assert not (path.parent / "metrics.json").is_symlink()
    assert json.loads((path.parent / "metrics.json").read_text())["step"] == 2
    assert not list(tmp_path.rglob("escaped*")) and list((tmp_path / "evaluation").glob("*escaped*"))


@pytest.mark.full
@pytest.mark.case(32)
def test_a_model_that_is_larger_than_its_weights_is_not_built(forge, tmp_path):
    for key, value in (("depth", 2**20), ("dim", 2**18)):
        path = forge(put("model", key, value=value))
        status, text = run(tmp_path, f"ckpt={path}", "trainer.accelerator=cpu", program="eval.py")
        assert status == 2 and "describes a larger model than the weights" in text, text


@pytest.mark.case(35)
@pytest.mark.parametrize("value", [{"$tuple": 5}, {"$dict": [[[], 1]]}, [1], {"$tensor": []}, {"$what": 1}, 7])
def test_a_state_that_is_none_of_ours_is_one_sentence(forge, tmp_path, value):
    def change(folder):
        state = json.loads((folder / "trainer.json").read_text())
        state["callbacks"] = value
        (folder / "trainer.json").write_text(json.dumps(state))

    arguments = (*TINY, "trainer.limit_train_batches=2", f"resume={forge(change=change)}", "run.name=b")
    status, text = run(tmp_path, *arguments)
    assert status == 2 and "Traceback" not in text, text
    assert "checkpoint" in text


@pytest.mark.full
@pytest.mark.case(35)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loops", {"fit_loop": {"state_dict": 1}}),
        ("loops", {"fit_loop": {"epoch_progress": {"total": 5}}}),
        ("optimizer_states", [{"state": 5}]),
        ("optimizer_states", [{"state": {}, "param_groups": []}]),
        ("lr_schedulers", ["x"]),
        ("callbacks", {"Checkpoints": []}),
        ("pytorch-lightning_version", "none"),
        ("epoch", "x"),
        ("state_dict", {"foreign": 1}),
    ],
)
def test_a_state_with_parts_of_another_kind_is_one_sentence(forge, tmp_path, key, value):
    def change(folder):
        state = json.loads((folder / "trainer.json").read_text())
        (folder / "trainer.json").write_text(json.dumps(state | {key: value}))

    arguments = (*TINY, "trainer.limit_train_batches=2", f"resume={forge(change=change)}", "run.name=b")
    status, text = run(tmp_path, *arguments)
    unused = ("callbacks", "lr_schedulers")  # of one that the run has not; the schedule is computed from the step
    assert "Traceback" not in text and (status == 2 or key in unused), text


@pytest.mark.case(24)
@pytest.mark.case(35)
@pytest.mark.parametrize("name", ["run is a list", "data is a list", "task is text", "no model", "classes"])
def test_a_run_is_not_continued_from_a_configuration_of_another_kind(forge, tmp_path, name):
    arguments = (*TINY, f"resume={forge(HOSTILE[name][0])}", "run.name=b")
    status, text = run(tmp_path, *arguments)
    assert status == 2 and "Traceback" not in text, text


@pytest.mark.case(35)
def test_weights_that_are_no_real_numbers_are_refused(forge, tmp_path):
    def change(folder):
        state = load_file(folder / "model.safetensors")
        name = next(name for name, value in state.items() if value.is_floating_point())
        save_file(state | {name: state[name].to(torch.int8)}, folder / "model.safetensors")

    status, text = run(tmp_path, f"ckpt={forge(change=change)}", "trainer.accelerator=cpu", program="eval.py")
    assert status == 2 and "weights must be real numbers, got torch.int8 in" in text, text


GARBAGE = {
    "deep": "[" * 100_000,
    "digits": '{"a": ' + "9" * 5000 + "}",
    "NUL": "a.png,b\n\0\0,c\n",
    "long": "a," + "x" * 200_000 + "\n",
    "numbers": "[1, 2]",
    "mixed": '[{"file": {}}, [1], null]',
    "coco": '{"images": [1], "annotations": [2], "categories": [3]}',
    "mapping": '{"a": "b"}',
    "empty": "",
    "text": "\x1b]0;owned\x07",
}


@pytest.mark.case(35)
@pytest.mark.parametrize("name", GARBAGE)
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "txt"])
def test_lists_of_strangers_are_read_or_refused(tmp_path, name, suffix):
    file = tmp_path / f"list.{suffix}"
    file.write_text(GARBAGE[name])
    for read in (read_list, read_classes, images_of):
        try:
            read(str(file))
        except UserError as error:
            assert len(str(error).splitlines()) == 1 or read is images_of


@pytest.mark.case(34)
@pytest.mark.parametrize(
    "path", ["x-{0..999999999999}.tar", "{0..9999}-{0..9999}.tar", "{a,b}" * 40, "{1..0}{0..9999999}"]
)
def test_braces_name_no_million_of_shards(path):
    with pytest.raises(UserError, match="braces may name 1000000 shards"):
        expanded(path, "data.source.train")


@pytest.mark.case(34)
def test_a_shard_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(UserError, match=r"a shard must be a whole, uncompressed tar file, .*it is a pipe"):
        index_of(str(tmp_path / "a.tar"))


@pytest.mark.case(32)
@pytest.mark.parametrize("name", ["download", "root"])
def test_options_of_a_named_set_download_nothing(tmp_path, name):
    with pytest.raises(UserError, match=f"options must be others of torchvision's class, got {name}"):
        NamedSet("imagenette", tmp_path, download=False, options={name: True})
