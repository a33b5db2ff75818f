"""Tar shards: what is in them, in which order they are read, and what is said of broken ones."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from data.changes import changes
from data.module import ImageData
from data.order.fingerprint import fingerprint
from data.order.sampler import TOGETHER, EpochBatchSampler
from data.sources.decode import UnreadableImage, read_image
from data.sources.webdataset import WebDataset, expanded

ENDS = (".png", ".cls")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.shard_index.CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shard(tmp_path):
    """A function that writes members into a tar file, images of one level by a number, and returns its path."""

    def write(name, members):
        (tmp_path / "shards").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "shards" / name, "w") as tar:
            for member, content in members.items():
                if isinstance(content, int):
                    Image.new("RGB", (8, 8), (content, 0, 0)).save(file := io.BytesIO(), "PNG")
                    content = file.getvalue()
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return tmp_path / "shards" / name

    return write


@pytest.fixture
def shards(shard):
    """Ten shards of five samples, labels `number % 3 + 1`."""
    for one in range(10):
        members = {}
        for number in range(5 * one, 5 * one + 5):
            members |= {f"{number:04d}.png": number, f"{number:04d}.cls": str(number % 3 + 1).encode()}
        path = shard(f"s-{one:03d}.tar", members)
    return path.parent


def test_samples_and_labels(shards, cache):
    source = WebDataset(f"{shards}/s-{{000..007}}.tar", f"{shards}/s-00[89].tar")
    assert source.classes == ["1", "2", "3"]
    assert source.train.labels.tolist() == [number % 3 for number in range(40)] and len(source.val) == 10
    image, label = source.train[17]
    assert image.getpixel((0, 0)) == (17, 0, 0) and label == 2
    assert source.val[9][0].getpixel((0, 0)) == (49, 0, 0)
    assert source.notes() == ["10 shards: 40 images for training, 10 for validation"]
    assert len(list(cache.iterdir())) == 10


def test_the_index_is_made_once_for_each_content(shards, shard, monkeypatch):
    first = WebDataset(str(shards)).train.places
    monkeypatch.setattr("tarfile.open", lambda *given: pytest.fail("read again"))
    assert np.array_equal(WebDataset(str(shards)).train.places, first)
    monkeypatch.undo()
    shard("s-000.tar", {"a.png": 1, "a.cls": b"1"})
    again = WebDataset(str(shards))
    assert len(again.train) + len(again.val) == 46


def test_a_share_is_held_out(shards):
    source = WebDataset(str(shards), val_fraction=0.4)
    assert (
        np.bincount(source.val.labels).tolist() == [7, 7, 6] and np.bincount(source.train.labels).tolist() == [10] * 3
    )
    assert source.notes() == ["10 shards: 30 images for training, 20 for validation, 40 % of each class by seed 0"]
    assert source.train.blocks.sum() == 30 and len(source.train.blocks) == 10


def test_a_few_shards_are_read_at_a_time_and_everything_once(shards):
    blocks = WebDataset(str(shards), val_fraction=0.4).train.blocks
    sampler = EpochBatchSampler(30, 3, seed=0, blocks=blocks)
    order = [draw.index for batch in sampler for draw in batch]
    assert sorted(order) == list(range(30))
    shard_of = np.repeat(np.arange(10), blocks)[order]
    changes = [set(shard_of[:position]) & set(shard_of[position:]) for position in range(1, 30)]
    assert max(map(len, changes)) <= TOGETHER  # so many have been begun and not ended
    sampler.set_epoch(1)
    assert [draw.index for batch in sampler for draw in batch] != order
    sampler.start_epoch, sampler.start_batch = 0, 4
    assert [draw.index for batch in sampler for draw in batch] == order[12:]


def test_the_batches_are_those_of_any_number_of_workers(shards):
    def pixels(workers):
        source = WebDataset(str(shards), val_fraction=0.4)
        data = ImageData(source, num_classes=3, image_size=8, batch_size=6, workers=workers)
        data.check()
        return [batch.images for batch in data.train_dataloader()]

    for one, other in zip(pixels(0), pixels(2), strict=True):
        assert one.equal(other)


@pytest.mark.case(23)
def test_a_run_that_goes_on_reads_nothing_of_what_lies_before(shards, monkeypatch):
    """The batches that follow are those of a run that never stopped, and no other image is decoded."""
    decoded = []
    monkeypatch.setattr("data.sources.webdataset.read_image", lambda *a: decoded.append(a[1]) or read_image(*a))

    def epoch(start):
        data = ImageData(WebDataset(str(shards), val_fraction=0.4), 3, 8, 3, workers=0)
        data.load_state_dict(data.state_dict() | {"epoch": 2, "batch": start})
        decoded.clear()
        return [(batch.number, batch.images, batch.labels.tolist()) for batch in data.train_dataloader()], list(decoded)

    whole, all_read = epoch(0)
    for start in (1, 7, 9):
        rest, read = epoch(start)
        assert [batch[0] for batch in rest] == list(range(start, 10)) and read == all_read[3 * start :]
        for one, other in zip(rest, whole[start:], strict=True):
            assert one[1].equal(other[1]) and one[2] == other[2]


@pytest.mark.case(24)
def test_shards_are_known_again(shards, shard, tmp_path):
    def seen(folder):
        source = WebDataset(str(folder), val_fraction=0.4)
        return fingerprint(source.classes, train=source.train, val=source.val)

    before = seen(shards)
    shutil.copytree(shards, tmp_path / "elsewhere")
    assert changes(before, seen(tmp_path / "elsewhere")) == []
    shard("s-003.tar", {f"{number:04d}{end}": 9 if end == ".png" else b"2" for number in (15, 16) for end in ENDS})
    assert "train: class '1' has" in changes(before, seen(shards))[0]


def test_names_in_json_and_folders(shard, tmp_path):
    members = {"a/1.jpg.png": 1, "a/1.json": json.dumps({"label": "cat", "id": 3}).encode(), "b/1.png": 2}
    members |= {"b/1.json": b'{"class": "ant"}', "c.png": 3, "d.cls": b"cat", "._e.png": 4, "f.json": b"{", "f.png": 5}
    source = WebDataset(str(shard("a.tar", members)), val_fraction=1)
    assert source.classes == ["ant", "cat"] and source.val.labels.tolist() == [1, 0]
    assert source.notes()[1] == "3 samples without image or label: a.tar: c, a.tar: d, a.tar: f"
    (tmp_path / "names.txt").write_text("cat\ndog\nant\n")
    named = WebDataset(str(shard("a.tar", members)), val_fraction=1, classes=tmp_path / "names.txt")
    assert named.val.labels.tolist() == [0, 2]


def test_a_broken_image_is_named(shard):
    source = WebDataset(str(shard("a.tar", {"1.jpg": b"no image", "1.cls": b"0"})), val_fraction=1)
    with pytest.raises(UnreadableImage, match=r"unreadable image, got .*a.tar at byte 512"):
        source.val[0]


def test_a_broken_shard_is_named(shards):
    path = shards / "s-003.tar"
    path.write_bytes(path.read_bytes()[:2600])
    with pytest.raises(
        ValueError, match=r"webdataset: a shard must be a whole, .*s-003.tar, broken after 00\d+.\w+ \("
    ):
        WebDataset(str(shards)).train  # noqa: B018
    path.write_bytes(b"\x1f\x8b" + b"x" * 2000)
    with pytest.raises(
        ValueError, match=r"uncompressed tar file, got .*s-003.tar, broken after its beginning .*; fetch"
    ):
        WebDataset(str(shards)).train  # noqa: B018


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("{s}/s-{000..002}.tar", ["s-000.tar", "s-001.tar", "s-002.tar"]),
        ("{s}/s-00{1,5}.tar", ["s-001.tar", "s-005.tar"]),
        ("{s}/s-0{0..0}{8..9}.tar", ["s-008.tar", "s-009.tar"]),
        (["{s}/s-009.tar", "{s}/s-00[89].tar"], ["s-009.tar", "s-008.tar"]),
    ],
)
def test_paths(shards, given, names):
    given = (
        given.replace("{s}", str(shards)) if isinstance(given, str) else [g.replace("{s}", str(shards)) for g in given]
    )
    assert [path.rpartition("/")[2] for path in expanded(given, "x")] == names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train": None},
            r"data.source.train: no shards, got None; give a path such as 'shards/train-\{000..009\}.tar'",
        ),
        ({"train": "none-{0..1}.tar"}, r"data.source.train: there is no shard none-0.tar, got none-\{0..1\}.tar; mend"),
        ({"val_fraction": 0}, r"data.val_fraction: must be a share above 0"),
        (
            {"val": "SAME", "val_fraction": 0.1},
            r"data.val_fraction: data.source.val names the validation shards, got 0.1",
        ),
    ],
)
def test_what_is_wrong(shards, settings, message):
    settings = {"train": str(shards)} | settings
    settings |= {"val": str(shards)} if "val" in settings else {}
    with pytest.raises(ValueError, match=message):
        WebDataset(**settings).val  # noqa: B018
