"""The sources: fixed splits, names, and what they say when the data is not as expected."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data.sources.decode import UnreadableImage
from data.sources.digits import Digits
from data.sources.fake import Fake
from data.sources.huggingface import HuggingFace
from data.sources.imagefolder import ImageFolder
from data.sources.imagenet1k import ImageNet1k


def test_digits_have_a_fixed_stratified_split():
    train, val = Digits().train, Digits().val
    assert (len(train), len(val)) == (1437, 360)
    assert np.bincount(val.labels).min() == 35 and np.bincount(val.labels).max() == 37
    assert train.labels[:8].tolist() == [3, 9, 1, 3, 1, 9, 4, 4]
    image, label = train[0]
    assert image.mode == "RGB" and image.size == (8, 8) and label == 3
    assert np.asarray(image).max() == 255
    assert Digits().classes == list("0123456789")


def test_no_image_is_in_both_splits_of_the_digits():
    from sklearn.datasets import load_digits

    source = Digits()
    both = np.concatenate([source.train.pixels, source.val.pixels]).reshape(1797, -1)
    whole = np.rint(load_digits().data * (255 / 16)).astype(np.uint8)
    assert np.array_equal(np.unique(both, axis=0), np.unique(whole, axis=0))


@pytest.mark.parametrize(("module", "package"), [("digits", "sklearn"), ("huggingface", "datasets")])
def test_packages_are_imported_when_used(module, package):
    code = f"import sys, data.sources.{module}; print({package!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_fake_is_deterministic_noise():
    left, right = Fake(num_classes=3, size=5), Fake(num_classes=3, size=5)
    image, label = left.train[4]
    assert image.size == (5, 5) and label == 1
    assert np.array_equal(image, right.train[4][0])
    assert not np.array_equal(image, left.train[5][0])
    assert not np.array_equal(image, left.val[4][0])
    assert not np.array_equal(image, Fake(num_classes=3, size=5, seed=1).train[4][0])
    assert (len(left.train), len(left.val), left.classes) == (256, 64, ["class 0", "class 1", "class 2"])


def test_imagefolder_sorts_classes_and_files(image_tree):
    source = ImageFolder(image_tree(("bee", "ant"), train=3, val=2))
    assert source.classes == ["ant", "bee"]
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [source.train[i][0].getpixel((0, 0))[0] for i in range(6)] == [40, 41, 42, 0, 1, 2]
    assert source.train.path(5).endswith("train/bee/2.png")
    assert len(source.val) == 4


def test_imagefolder_equals_torchvisions(image_tree):
    from torchvision.datasets import ImageFolder as Theirs

    root = image_tree(("b", "a", "C"), train=2)
    theirs, ours = Theirs(root / "train"), ImageFolder(root)
    assert ours.classes == theirs.classes
    assert [(ours.train.path(i), int(ours.train.labels[i])) for i in range(len(theirs))] == theirs.samples


def test_imagefolder_takes_any_file_name(tmp_path):
    for split in ("train", "val"):
        folder = tmp_path / split / "æ ø"
        folder.mkdir(parents=True)
        Image.new("RGB", (2, 2), "red").save(folder / "ž'1.png")
    image, label = ImageFolder(tmp_path).train[0]
    assert image.getpixel((0, 0)) == (255, 0, 0) and label == 0


def test_imagefolder_reads_nothing_until_asked():
    source = ImageFolder(None)
    with pytest.raises(ValueError, match=r"data.root: no image folder, got None"):
        source.classes  # noqa: B018


def test_imagefolder_names_the_unreadable_file(image_tree):
    root = image_tree()
    (root / "val" / "ant" / "0.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"got .*images/val/ant/0.png"):
        ImageFolder(root).val[0]


def test_validation_cannot_add_classes(image_tree):
    root = image_tree()
    (root / "val" / "cow").mkdir()
    with pytest.raises(ValueError, match=r"ImageFolder: classes in val that train lacks, got cow \(1 in .*/val\)"):
        ImageFolder(root).val  # noqa: B018


def test_imagenet_needs_a_thousand_wordnet_ids(tmp_path):
    for split in ("train", "val"):
        for number in range(1000):
            (tmp_path / split / f"n{number:08d}").mkdir(parents=True)
    assert len(ImageNet1k(tmp_path).classes) == 1000
    (tmp_path / "train" / "n00000999").rmdir()
    with pytest.raises(ValueError, match=r"ImageNet1k: 1000 class folders expected, got 999 in .*/train"):
        ImageNet1k(tmp_path).classes  # noqa: B018
    (tmp_path / "train" / "tench").mkdir()
    with pytest.raises(ValueError, match=r"ImageNet1k: folders that are no WordNet id .*, got tench in .*/train"):
        ImageNet1k(tmp_path).classes  # noqa: B018


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """A function that writes a Parquet file of 12 plain images and returns the arguments that read it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()

    def encoded(level):
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (level, 0, 0)).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    def write(label=None, labels=None, columns=("picture", "label")):
        label = label or datasets.ClassLabel(names=["ant", "bee", "cow"])
        features = datasets.Features({columns[0]: datasets.Image(), columns[1]: label})
        values = {columns[0]: [encoded(i) for i in range(12)], columns[1]: labels or [i % 3 for i in range(12)]}
        datasets.Dataset.from_dict(values, features=features).to_parquet(tmp_path / "a.parquet")
        files = {"train": str(tmp_path / "a.parquet"), "validation": str(tmp_path / "a.parquet")}
        return {"path": "parquet", "data_files": files, "cache_dir": str(tmp_path / "cache")}

    return write


def test_huggingface_reads_parquet(parquet):
    source = HuggingFace(**parquet())
    assert source.classes == ["ant", "bee", "cow"]
    assert source.train.labels.tolist() == [0, 1, 2] * 4 and source.train.labels.dtype == np.int64
    image, label = source.train[5]
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (5, 0, 0) and label == 2
    assert len(source.val) == 12


def test_huggingface_takes_plain_integers_and_slices(parquet):
    import datasets

    source = HuggingFace(**parquet(datasets.Value("int32")), train="train[:6]", val="train[6:]")
    assert source.classes == ["0", "1", "2"]
    assert (len(source.train), len(source.val)) == (6, 6)
    assert source.val[0][0].getpixel((0, 0)) == (6, 0, 0)


def test_huggingface_reads_a_folder(image_tree, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = image_tree(("ant", "bee"))
    source = HuggingFace("imagefolder", data_dir=str(root), cache_dir=str(tmp_path / "cache"))
    assert source.classes == ["ant", "bee"]
    assert (len(source.train), len(source.val)) == (6, 4)
    assert sorted(source.train[i][0].getpixel((0, 0))[0] for i in range(6)) == [0, 1, 2, 40, 41, 42]


def test_huggingface_lists_the_splits(parquet):
    source = HuggingFace(**parquet(), val="test")
    with pytest.raises(ValueError, match="no such split in parquet, got test, there are train, validation"):
        source.val  # noqa: B018


def test_huggingface_lists_the_columns(parquet):
    message = r"the label column is not clear, got data.source.label=None, .* picture \(Image\), kind \(Value\)"
    import datasets

    arguments = parquet(datasets.Value("int64"), columns=("picture", "kind"))
    with pytest.raises(ValueError, match=message):
        HuggingFace(**arguments).classes  # noqa: B018
    with pytest.raises(ValueError, match=r"the image column is not clear, got data.source.image=photo"):
        HuggingFace(**arguments, image="photo", label="kind").classes  # noqa: B018
    assert HuggingFace(**arguments, label="kind").classes == ["0", "1", "2"]


def test_huggingface_refuses_labels_that_are_text(parquet):
    import datasets

    arguments = parquet(datasets.Value("string"), labels=["ant"] * 12)
    with pytest.raises(ValueError, match="labels must be classes or whole numbers, got column label of Value"):
        HuggingFace(**arguments).train  # noqa: B018


def test_huggingface_formats_need_files():
    with pytest.raises(ValueError, match=r"HuggingFace: no files, got path=imagefolder alone; set data.source"):
        HuggingFace("imagefolder").train  # noqa: B018


def test_huggingface_names_the_unreadable_row(parquet):
    source = HuggingFace(**parquet())
    source.train.rows = [{"picture": {"bytes": b"x", "path": "a.png"}}, {"picture": None}]
    with pytest.raises(UnreadableImage, match=r"got row 0 \(a.png\)"):
        source.train[0]
    with pytest.raises(UnreadableImage, match="got row 1"):
        source.train[1]


def test_huggingface_holds_out_a_share_of_every_class(parquet):
    source = HuggingFace(**parquet(), val_fraction=0.25)
    assert np.bincount(source.val.labels).tolist() == [1, 1, 1] and np.bincount(source.train.labels).tolist() == [3] * 3
    levels = [split[i][0].getpixel((0, 0))[0] for split in (source.train, source.val) for i in range(len(split))]
    assert sorted(levels) == list(range(12)) and [level % 3 for level in levels[9:]] == source.val.labels.tolist()
    assert source.notes() == ["train: 9 images for training, 3 for validation, 25 % of each class by seed 0"]
    with pytest.raises(ValueError, match=r"data.val_fraction: must be a share above 0"):
        HuggingFace(**parquet(), val_fraction=0).train  # noqa: B018


def test_huggingface_counts_labels_from_their_first(parquet):
    import datasets

    source = HuggingFace(**parquet(datasets.Value("int32"), labels=[5 + i % 3 for i in range(12)]))
    assert source.classes == ["5", "6", "7"] and source.train.labels.tolist() == [0, 1, 2] * 4
    assert source.notes() == ["labels 5 to 7 are counted from 0"]


def test_streamed_rows_are_those_of_the_prepared_set(parquet, tmp_path):
    """Files of several groups of rows, split by expressions."""
    import datasets
    import pyarrow.parquet

    settings = parquet() | {"train": "train[:75%]", "val": "train[75%:]"}
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    plain, streamed = HuggingFace(**settings), HuggingFace(**settings, streaming=True)
    assert streamed.classes == plain.classes == ["ant", "bee", "cow"]
    for ours, theirs in ((streamed.train, plain.train), (streamed.val, plain.val)):
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert [ours[i][0].getpixel((0, 0)) for i in range(len(ours))] == [
            theirs[i][0].getpixel((0, 0)) for i in range(len(theirs))
        ]
    assert streamed.train.blocks.tolist() == [2, 2, 2, 2, 1, 0] and plain.train.blocks is None
    assert streamed.notes() == ["rows are streamed, in 6 groups, a few mixed at a time"]
    held = HuggingFace(**settings | {"train": "train"}, val_fraction=0.25, streaming=True)
    assert (
        held.val.labels.tolist() == HuggingFace(**settings | {"train": "train"}, val_fraction=0.25).val.labels.tolist()
    )
    assert (
        isinstance(plain._rows["train"], datasets.Dataset) and "_rows" not in streamed.__dict__
    )  # nothing was prepared


def test_streamed_batches_are_those_of_any_number_of_workers(parquet, tmp_path):
    import pyarrow.parquet

    from data.module import ImageData

    settings = parquet()
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)

    def indices(workers):
        data = ImageData(HuggingFace(**settings, streaming=True), 3, 8, batch_size=4, workers=workers)
        data.check()
        return [
            (batch.indices.tolist(), batch.images.float().mean((1, 2, 3)).tolist()) for batch in data.train_dataloader()
        ]

    assert indices(0) == indices(2)


def test_labels_that_a_streamed_file_may_not_have(parquet, tmp_path, monkeypatch):
    """None in a row, text in another file than the first, more rows than memory is for."""
    import pyarrow

    from data.sources import parquet_rows

    settings, second = parquet(), tmp_path / "b.parquet"
    settings["data_files"] = {"train": [str(tmp_path / "a.parquet"), str(second)], "validation": str(second)}
    images = pyarrow.array([{"bytes": b"x", "path": None}] * 2)
    for labels, said in (([1, None], "every row must have a label, got 1 rows"), (["a", "b"], "must be whole numbers")):
        pyarrow.parquet.write_table(pyarrow.table({"picture": images, "label": labels}), second)
        with pytest.raises(ValueError, match=rf"^HuggingFace: .*{said}.* in .*b\.parquet; "):
            len(HuggingFace(**settings, streaming=True).train)
    pyarrow.parquet.write_table(pyarrow.table({"picture": images, "label": [1, 0]}), second)
    monkeypatch.setattr(parquet_rows, "MAX_ROWS", 11)
    with pytest.raises(ValueError, match=r"must have at most 11 rows, got 12 in .*a\.parquet; cut it into parts"):
        len(HuggingFace(**settings, streaming=True).train)


@pytest.mark.case(23)
@pytest.mark.case(24)
def test_a_streamed_run_goes_on_at_its_place_and_in_the_same_rows(parquet, tmp_path, monkeypatch):
    """No group of rows before the place is read, but those that are mixed with what follows."""
    import pyarrow.parquet

    from data.changes import changes
    from data.module import ImageData
    from data.sources.parquet_rows import ParquetRows

    settings, groups, group = parquet(), [], ParquetRows._group
    monkeypatch.setattr(ParquetRows, "_group", lambda rows, number: groups.append(number) or group(rows, number))
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)

    def epoch(start):
        data = ImageData(HuggingFace(**settings, streaming=True), 3, 8, batch_size=2, workers=0)
        data.load_state_dict(data.state_dict() | {"epoch": 1, "batch": start})
        groups.clear()
        return [batch.indices.tolist() for batch in data.train_dataloader()], list(groups), data.fingerprint

    whole, read, before = epoch(0)
    for start in (1, 5):
        rest, of_rest, same = epoch(start)
        assert rest == whole[start:] and of_rest == read[2 * start :] and same == before
    pyarrow.parquet.write_table(
        table.slice(0, 12).take([1, 0, *range(2, 12)]), tmp_path / "a.parquet", row_group_size=1
    )
    assert changes(before, epoch(0)[2])[0].startswith("train: class 'ant' has other files")
    plain = ImageData(HuggingFace(**settings), 3, 8, batch_size=2).fingerprint
    assert plain["train"]["counts"] == [4, 4, 4] and plain["train"]["contents"]


def test_what_cannot_be_streamed(parquet, image_tree, tmp_path):
    with pytest.raises(ValueError, match="streaming reads Parquet files, got imagefolder in another format; set data"):
        HuggingFace("imagefolder", data_dir=str(image_tree()), streaming=True, cache_dir=str(tmp_path / "c")).train  # noqa: B018
    with pytest.raises(ValueError, match="no such split in parquet, got test, there are train, validation"):
        HuggingFace(**parquet(), val="test", streaming=True).val  # noqa: B018
    with pytest.raises(ValueError, match="HuggingFace: streaming must be true or false, got 'yes'"):
        HuggingFace(**parquet(), streaming="yes")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(ValueError, match=r"HuggingFace: no Parquet file can be read, got .*a.parquet \("):
        HuggingFace(**settings_of(tmp_path), streaming=True).classes  # noqa: B018


def settings_of(folder):
    files = {"train": str(folder / "a.parquet"), "validation": str(folder / "a.parquet")}
    return {"path": "parquet", "data_files": files, "cache_dir": str(folder / "cache")}
