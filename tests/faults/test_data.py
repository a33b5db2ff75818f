"""Data that fails while a run goes on: processes that die or hang, images that cannot be read, small machines."""

import csv
import os
import resource
import signal

import pytest
import torch

from conf.errors import DataFailed
from data import limits
from data.loader import EpochLoader
from data.module import ImageData
from data.sources.imagefolder import ImageFolder
from tests.faults.programs import TINY, run


def images(root, **options) -> ImageData:
    given = {"batch_size": 4, "workers": 2, "seed": 3, "augment": {"hflip": 0.5}} | options
    return ImageData(ImageFolder(root, index=None), 2, 12, **given)


def read(loader: EpochLoader, hurt=lambda number, loader: None) -> list[torch.Tensor]:
    """All batches; `hurt` is called after each."""
    found = []
    for number, batch in enumerate(loader):
        found.append(torch.cat([batch.images.flatten().float(), batch.indices.float()]))
        hurt(number, loader)
    return found


def kill(loader: EpochLoader, number: int = signal.SIGKILL, workers: slice = slice(1)) -> None:
    for process in loader._iterator._workers[workers]:
        os.kill(process.pid, number)


@pytest.mark.case(43)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_process_that_dies_is_started_again_at_the_same_batch(image_tree, split, capsys):
    root = image_tree(train=20, val=20)
    whole = read(getattr(images(root), f"{split}_dataloader")())
    loader = getattr(images(root), f"{split}_dataloader")()
    found = read(loader, lambda number, loader: kill(loader) if number in (1, 3) else None)
    assert len(found) == 10 and all(map(torch.equal, whole, found))
    said = capsys.readouterr().out
    assert "data: a loader process was killed by SIGKILL while it read batch" in said
    assert f"{split}/" in said and ".png" in said and "started again (1 of 3 times)" in said
    kill(loader)
    assert all(map(torch.equal, whole, read(loader)))  # the next iteration
    assert "data: a loader process was killed by SIGKILL between epochs; started again" in capsys.readouterr().out


@pytest.mark.case(43)
def test_processes_that_die_again_and_again_end_the_run(image_tree):
    loader = images(image_tree(train=40)).train_dataloader()
    with pytest.raises(
        DataFailed, match=r"was killed by SIGKILL while it read batch \d+ .*\.png.*; set fewer data.work"
    ):
        read(loader, lambda number, loader: kill(loader))


@pytest.mark.case(43)
def test_a_process_that_hangs_ends_the_run_with_its_files(image_tree):
    loader = images(image_tree(train=20), timeout=1.5).train_dataloader()
    with pytest.raises(DataFailed, match=r"gave no batch for 1.5 seconds while it read batch \d .*\.png.*data.timeout"):
        read(loader, lambda number, loader: kill(loader, signal.SIGSTOP, slice(2)))


@pytest.mark.full
@pytest.mark.case(42)
def test_a_class_that_cannot_be_read_ends_the_run(image_tree, tmp_path):
    root = image_tree(train=8)
    for path in (root / "train/ant").iterdir():
        path.write_bytes(b"")
    given = ("data=imagefolder", f"data.root={root}", "data.batch_size=8", "data.workers=0", "data.on_error=skip")
    status, text = run(tmp_path, *TINY[:4], *given, *TINY[-4:], "run.name=a")
    assert status == 65 and "data: no image of class ant can be read, the last read_image: " in text, text
    assert "Traceback" not in text


@pytest.mark.case(42)
@pytest.mark.case(38)
def test_more_bad_images_than_allowed_end_the_run(image_tree):
    root = image_tree(train=30)
    for number in range(12):
        (root / f"train/{('ant', 'bee')[number % 2]}/{number}.png").write_bytes(b"")
    data = images(root, on_error="skip", workers=0)
    with pytest.raises(DataFailed, match=r"more images cannot be read than data.max_skipped allows, got 11 of 60, the"):
        read(data.train_dataloader())
    assert len(read(images(root, on_error="skip", workers=0, max_skipped=0.5).train_dataloader())) == 15


@pytest.mark.case(38)
def test_images_that_were_left_out_are_listed(image_tree, tmp_path):
    root = image_tree(train=8)
    (root / "train/bee/3.png").write_bytes(b"no image")
    given = ("data=imagefolder", f"data.root={root}", "data.batch_size=4", "data.workers=1", "data.on_error=skip")
    status, text = run(tmp_path, *TINY[:4], *given, *TINY[-4:], "run.name=a")
    assert status == 0 and "1 unreadable images were left out so far" in text, text
    rows = list(csv.DictReader((tmp_path / "outputs/a/skipped.csv").open()))
    assert [(row["image"].rpartition("train/")[2], row["class"]) for row in rows] == [("bee/3.png", "bee")]
    assert "UnidentifiedImageError" in rows[0]["reason"]


@pytest.mark.case(43)
def test_little_shared_memory_is_said_before_it_strikes(image_tree, monkeypatch):
    monkeypatch.setattr(limits, "_free_shared", lambda: 3 * 2**20)
    data = images(image_tree(train=20), batch_size=8)
    data.check()
    data.crop_size = 512
    said = r"data.workers: 2 processes hand over batches of 6 MiB in /dev/shm, 24 MiB in all, which has 3 MiB free; set"
    with pytest.raises(ValueError, match=said):
        data.check()
    data.workers = 0
    del data._worker_count
    data.check()


@pytest.mark.case(43)
def test_few_open_files_are_said_before_they_are_used_up(image_tree, monkeypatch):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 1024))
    monkeypatch.setattr(resource, "setrlimit", lambda _, given: asked.append(given))
    images(image_tree(train=20)).check()
    assert asked == [(280, 1024)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 256))
    with pytest.raises(ValueError, match=r"2 processes need about 280 open files, and the limit is 256; set data.work"):
        images(image_tree(train=20)).check()
