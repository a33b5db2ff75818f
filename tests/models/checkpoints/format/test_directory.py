"""A checkpoint directory is found, verified, replaced and swept as its format promises."""

import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from models.checkpoints import latest, read_config, read_manifest, resolve, verify
from models.checkpoints.format.directory import CorruptCheckpoint, OtherFormat, step_directories, step_name
from models.checkpoints.format.write import point, probe, recover, remove_checkpoint, sweep, write_checkpoint


def write(folder, step, config=None, value=0.0):
    tensors = {"model.safetensors": {"w": torch.full((3,), float(value))}, "trainer.safetensors": {}}
    manifest = {"step": step, "epoch": 0, "metrics": {}, "versions": {}}
    path = folder / step_name(step)
    write_checkpoint(path, tensors, {"trainer.json": {}, "config.json": config or {"seed": step}}, manifest)
    return path


def flip(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def test_manifest_lists_every_other_file(tmp_path):
    path = write(tmp_path, 800)
    manifest = verify(path)
    assert path.name == "step-00000800" and manifest["step"] == 800 and manifest["format"] == 1
    assert set(manifest["files"]) == {entry.name for entry in path.iterdir()} - {"manifest.json"}
    assert read_config(path) == {"seed": 800}
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000800"]  # no temporary is left


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.safetensors", "trainer.json", "config.json"])
def test_a_flipped_bit_is_named(tmp_path, name):
    path = write(tmp_path, 1)
    flip(path / name)
    with pytest.raises(CorruptCheckpoint, match=rf"checksum mismatch in .*{name}"):
        verify(path)


def test_truncated_and_missing_files_are_named(tmp_path):
    path = write(tmp_path, 1)
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-4])
    with pytest.raises(CorruptCheckpoint, match=rf"expected {len(content)} bytes .* got {len(content) - 4}"):
        verify(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors is missing"):
        verify(path)


def test_latest_goes_by_step_number_and_passes_over_damage(tmp_path):
    for step in (9, 10, 100):
        write(tmp_path, step)
    os.utime(tmp_path / step_name(9), (2e9, 2e9))
    assert latest(tmp_path).name == step_name(100)
    flip(tmp_path / step_name(100) / "model.safetensors")
    (tmp_path / step_name(200)).mkdir()  # a writer that never finished
    reports = []
    assert latest(tmp_path, reports.append).name == step_name(10)
    assert len(reports) == 2 and "no manifest.json" in reports[0] and "checksum mismatch" in reports[1]
    assert latest(tmp_path / "nowhere") is None


def test_pointers_are_links_or_text(tmp_path, monkeypatch):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    point(tmp_path / "last", first)
    assert os.readlink(tmp_path / "last") == first.name
    point(tmp_path / "last", second)
    assert resolve(tmp_path / "last") == second.resolve()

    def no_links(*_):
        raise OSError("no symbolic links here")

    monkeypatch.setattr("pathlib.Path.symlink_to", no_links)
    point(tmp_path / "best", first)
    assert (tmp_path / "best").read_text() == "step-00000001\n"
    assert resolve(tmp_path / "best") == first.resolve()


def test_a_text_pointer_never_leads_out_of_its_folder(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "best").write_text("../../etc\n")
    with pytest.raises(ValueError, match=r"pointer .*best must name a step, got '../../etc'"):
        resolve(tmp_path / "best")


def test_a_missing_path_lists_what_exists(tmp_path):
    folder = tmp_path / "checkpoints"
    point(folder / "last", write(folder, 12))
    for path in (folder / "step-00000013", tmp_path / "best"):
        with pytest.raises(ValueError, match=r"nothing at this path.*choose one of last, step-00000012 in"):
            resolve(path)
    with pytest.raises(ValueError, match=r"has no manifest\.json, .*choose one of last, step-00000012"):
        resolve(folder)
    assert resolve(tmp_path) == folder / "step-00000012", "a run without a best checkpoint"
    (folder / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a file and not a checkpoint directory"):
        resolve(folder / "notes.txt")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 2}, r"must have format 1, got 2"),
        ({"files": {"../../x": {"sha256": "", "bytes": 0}}}, r"must list files and a step"),
        ({"step": "7"}, r"must list files and a step"),
        ({"step": -1}, r"must list files and a step"),
        ({"step": 10**13}, r"must list files and a step"),
        ({"step": 10**200}, r"cannot be read, got ValueError: a number of 201 digits"),
        ({"files": {"a": {"sha256": 5, "bytes": "1"}}}, r"must list files and a step"),
    ],
)
def test_a_foreign_manifest_is_refused(tmp_path, change, match):
    path = write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text()) | change
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptCheckpoint, match=match):
        read_manifest(path)


def test_a_manifest_that_is_no_json_is_refused(tmp_path):
    path = write(tmp_path, 1)
    for text in ("{", "[" * 100_000, "[1]"):
        (path / "manifest.json").write_text(text)
        with pytest.raises(CorruptCheckpoint, match=r"cannot be read|must have format 1"):
            read_manifest(path)


def test_a_failed_write_keeps_the_older_checkpoint_and_leaves_nothing(tmp_path, monkeypatch):
    path = write(tmp_path, 5, value=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("models.checkpoints.format.write.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, 5, value=2)
    assert verify(path)["step"] == 5
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_kill_between_renames_loses_nothing(tmp_path, monkeypatch, failing):
    """KeyboardInterrupt stands for SIGKILL: `_replace` catches only OSError, and the clean-up is patched away."""
    write(tmp_path, 5, config={"version": "old"})
    rename, calls = os.rename, []

    def killed(source, target):
        calls.append(source)
        if len(calls) == failing:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("models.checkpoints.format.write.os.rename", killed)
        patch.setattr("models.checkpoints.format.write.shutil.rmtree", lambda *_, **__: None)
        if failing < 3:
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path, 5, config={"version": "new"})
        else:
            write(tmp_path, 5, config={"version": "new"})
    recover(tmp_path)
    path = latest(tmp_path)
    assert read_config(path) == {"version": "old" if failing == 1 else "new"}
    sweep(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [step_name(5)]
    assert latest(tmp_path) == path


@pytest.mark.parametrize("written", [0, 20])
def test_a_writer_killed_while_it_writes_the_manifest_leaves_no_checkpoint(tmp_path, written):
    whole = write(tmp_path, 7)
    unfinished = tmp_path / f".writing-{step_name(8)}-1"
    shutil.copytree(whole, unfinished)
    (unfinished / "manifest.json").write_bytes((whole / "manifest.json").read_bytes()[:written])
    recover(tmp_path)
    assert list(step_directories(tmp_path)) == [7] and unfinished.exists()
    sweep(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [step_name(7)]


def test_killed_writers_never_lose_a_finished_checkpoint(tmp_path):
    """SIGKILL at ten different moments of endless saving and pruning, in a forked child that runs no Python exit."""
    newest = 0
    for attempt in range(10):
        read, announce = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                for step in itertools.count(newest + 1):
                    write(tmp_path, step, value=step)
                    os.write(announce, step.to_bytes(4, "big"))
                    for old in list(step_directories(tmp_path).values())[:-2]:
                        remove_checkpoint(old)
            finally:
                os._exit(1)
        os.close(announce)
        newest = int.from_bytes(os.read(read, 4), "big")  # at least one was finished
        time.sleep(0.003 * attempt)  # what follows holds whenever it is
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while finished := os.read(read, 4):
            newest = int.from_bytes(finished, "big")
        os.close(read)
        recover(tmp_path)
        path = latest(tmp_path, pytest.fail)
        assert newest <= read_manifest(path)["step"] <= newest + 1
        assert load_file(path / "model.safetensors")["w"][0] == read_manifest(path)["step"]
        newest = read_manifest(path)["step"]
    sweep(tmp_path)
    assert all(entry.name.startswith("step-") for entry in tmp_path.iterdir())


def test_a_full_disk_is_an_oserror(tmp_path):
    """A file size limit in a forked child stands for the full disk; safetensors has its own type for it."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_checkpoint(tmp_path / step_name(1), {"model.safetensors": {"w": torch.zeros(4000)}}, {}, {"step": 1})
        except OSError:
            os._exit(40)
        finally:
            os._exit(41)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 40
    assert list(tmp_path.iterdir()) == []


def test_half_deleted_and_half_written_directories_do_not_count(tmp_path):
    keep, drop = write(tmp_path, 1), write(tmp_path, 2)
    remove_checkpoint(drop)
    assert [entry.name for entry in tmp_path.iterdir()] == [keep.name]
    (tmp_path / ".trash-step-00000007-1").mkdir()
    (tmp_path / ".writing-step-00000008-1").mkdir()
    assert list(step_directories(tmp_path)) == [1]
    sweep(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [keep.name]


def test_the_probe_leaves_nothing_and_passes_errors_on(tmp_path, monkeypatch):
    probe(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []

    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("models.checkpoints.format.write.os.rename", read_only)
    with pytest.raises(OSError, match="Read-only"):
        probe(tmp_path)


def test_unreadable_checkpoints_are_never_taken_for_none(tmp_path):
    for step in (1, 2):
        flip(write(tmp_path, step) / "model.safetensors")
    (tmp_path / step_name(3)).mkdir()  # a writer that never finished
    with pytest.raises(CorruptCheckpoint, match=r"no checkpoint in .* can be read, so nothing is started and nothing"):
        latest(tmp_path)
    shutil.rmtree(tmp_path / step_name(1))
    shutil.rmtree(tmp_path / step_name(2))
    assert latest(tmp_path) is None
    path = write(tmp_path, 4)
    (path / "manifest.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"has no manifest\.json.*; no checkpoint in .* can be read"):
        latest(tmp_path)


def test_a_later_format_is_not_damage(tmp_path):
    """Older steps could be read, but to go on from them would lose the newer one."""
    paths = [write(tmp_path, step) for step in (1, 2)]
    manifest = json.loads((paths[1] / "manifest.json").read_text())
    (paths[1] / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(OtherFormat, match=r"step-00000002 must have format 1, got 2; use another version"):
        latest(tmp_path)
    (paths[1] / "manifest.json").write_text(json.dumps(manifest | {"format": "1"}))
    assert latest(tmp_path) == paths[0]


def test_a_folder_or_file_that_gives_an_error_is_not_empty(tmp_path, monkeypatch):
    paths = [write(tmp_path, step) for step in (1, 2)]

    def broken(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("models.checkpoints.format.directory.hashlib.file_digest", broken)
        with pytest.raises(
            CorruptCheckpoint, match=r"cannot be read, got \[Errno 5\] Input/output error; no checkpoint"
        ):
            latest(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.iterdir", broken)
        with pytest.raises(CorruptCheckpoint, match=r"cannot be read, got \[Errno 5\]"):
            latest(tmp_path)
    assert latest(tmp_path) == paths[1]


def test_a_file_that_stands_is_hashed_once(tmp_path, monkeypatch):
    path, real, hashed = write(tmp_path, 1), hashlib.file_digest, []

    def note(file, kind):
        hashed.append(os.path.basename(file.name))
        return real(file, kind)

    monkeypatch.setattr("models.checkpoints.format.directory.hashlib.file_digest", note)
    verify(path)
    verify(path)
    assert hashed.count("model.safetensors") == 2, "it is so young that it could change within one tick"
    monkeypatch.setattr("models.checkpoints.format.directory.FRESH", -1)
    for _ in range(3):
        verify(path)
    assert hashed.count("model.safetensors") == 3
    flip(path / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match="checksum mismatch"):
        verify(path)


def test_files_that_stand_are_linked_and_not_written_again(tmp_path, monkeypatch):
    def put(value, standing=None):
        content = {"model.safetensors": {"w": torch.full((3,), value)}}
        manifest = {"step": 1, "epoch": 0, "metrics": {"value": value}}
        return write_checkpoint(tmp_path / step_name(1), content, {"trainer.json": value}, manifest, standing)

    files = put(1.0)
    node = (tmp_path / step_name(1) / "model.safetensors").stat().st_ino
    assert put(2.0, files) == files  # the same tensors, by their checksum
    assert verify(tmp_path / step_name(1))["metrics"] == {"value": 2.0}
    assert (tmp_path / step_name(1) / "model.safetensors").stat().st_ino == node

    def no_links(*_, **__):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("models.checkpoints.format.write.os.link", no_links)
    assert put(3.0, files) != files
    assert verify(tmp_path / step_name(1))["metrics"] == {"value": 3.0}
    assert [entry.name for entry in tmp_path.iterdir()] == [step_name(1)]
