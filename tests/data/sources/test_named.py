"""The data sets that have a name, on files of their formats: labels, names and images are where they should be."""

import json
import pickle
import urllib.error

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from torchvision import datasets

from conf.names import CONF
from data.sources.decode import UnreadableImage
from data.sources.named import SETS, NamedSet


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision compares no checksums: the files are ours."""
    for module in ("cifar", "mnist", "flowers102"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: __import__("os").path.exists(path)
        )


def image(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (level, 0, 0)).save(path, "JPEG", quality=100)


def cifar(root, names, files, labels, meta):
    (folder := root / SETS[names][1]).mkdir(parents=True)
    for start, (file, count) in enumerate(files):
        pixels = np.full((count, 3072), 10 * start, np.uint8)
        (folder / file).write_bytes(pickle.dumps({"data": pixels, labels: [(start + i) % 10 for i in range(count)]}))
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: [f"class {i}" for i in range(10)]}))


def cifar10(root):
    files = [*((f"data_batch_{i}", 2) for i in range(1, 6)), ("test_batch", 3)]
    cifar(root, "cifar10", files, "labels", ("batches.meta", "label_names"))
    return [0, 1, 1, 2, 2, 3, 3, 4, 4, 5], [5, 6, 7], "class 0"


def cifar100(root):
    cifar(root, "cifar100", [("train", 3), ("test", 2)], "fine_labels", ("meta", "fine_label_names"))
    return [0, 1, 2], [1, 2], "class 0"


def fashion_mnist(root):
    (folder := root / "FashionMNIST" / "raw").mkdir(parents=True)
    for part, labels in (("train", [9, 0, 3]), ("t10k", [1, 2])):
        count = np.array([len(labels)], ">i4").tobytes()
        pixels = np.full((len(labels), 28, 28), 7, np.uint8).tobytes()
        side = np.array([28, 28], ">i4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + count + side + pixels)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + count + bytes(labels))
    return [9, 0, 3], [1, 2], "T-shirt/top"


def flowers102(root):
    from scipy.io import savemat

    (folder := root / "flowers-102").mkdir()
    for number in range(1, 7):
        image(folder / "jpg" / f"image_{number:05d}.jpg", 40 * number)
    savemat(folder / "imagelabels.mat", {"labels": np.array([77, 1, 102, 5, 6, 9])})
    savemat(folder / "setid.mat", {"trnid": np.array([1, 3]), "valid": np.array([2, 4]), "tstid": np.array([5, 6])})
    return [76, 101], [0, 4], "pink primrose"


def food101(root):
    names = [f"dish_{number:03d}" for number in range(101)]
    for part, count in (("train", 2), ("test", 1)):
        files = {name: [f"{name}/{part}{i}" for i in range(count)] for name in names}
        (root / "food-101" / "meta").mkdir(parents=True, exist_ok=True)
        (root / "food-101" / "meta" / f"{part}.json").write_text(json.dumps(files))
    image(root / "food-101" / "images" / "dish_000" / "train0.jpg", 80)
    return [0, 0, 1, 1], [0, 1], "dish_000"


def pets(root):
    (folder := root / "oxford-iiit-pet" / "annotations").mkdir(parents=True)
    rows = {"trainval": ["Abyssinian_1 1 1 1", "american_bulldog_7 2 2 1"], "test": ["Abyssinian_2 1 1 1"]}
    for part, lines in rows.items():
        (folder / f"{part}.txt").write_text("\n".join(lines))
    image(folder.parent / "images" / "Abyssinian_1.jpg", 120)
    return [0, 1], [0], "Abyssinian"


def imagenette(root):
    for part in ("train", "val"):
        for wordnet_id in datasets.Imagenette._WNID_TO_CLASS:
            image(root / "imagenette2-320" / part / wordnet_id / "1.jpeg", 160)
    return [0, 1], [0, 1], "tench"


def configured(name, root):
    node = OmegaConf.to_container(OmegaConf.load(CONF / "data" / f"{name}.yaml"))
    source = node["source"] | {"root": str(root)}
    del source["_target_"]
    return NamedSet(**source), node


@pytest.mark.parametrize(
    ("make", "level"),
    [(cifar10, 0), (cifar100, 0), (fashion_mnist, 7), (flowers102, 40), (food101, 80), (pets, 120), (imagenette, 160)],
)
def test_files_of_the_right_format(make, level, tmp_path, unchecked):
    train, val, first = make(tmp_path)
    source, node = configured(make.__name__, tmp_path)
    assert source.train.labels.dtype == np.int64
    assert source.train.labels[: len(train)].tolist() == train and source.val.labels[: len(val)].tolist() == val
    assert source.classes[0] == first and len(source.classes) <= node["num_classes"]
    picture, label = source.train[0]
    assert picture.mode == "RGB" and abs(picture.getpixel((1, 1))[0] - level) <= 1 and label == train[0]


def test_every_name_has_its_configuration():
    assert all((CONF / "data" / f"{name}.yaml").exists() and hasattr(datasets, SETS[name][0]) for name in SETS)


def test_several_splits_are_one(tmp_path, unchecked):
    flowers102(tmp_path)
    source = NamedSet("flowers102", tmp_path, train=["train", "val"], val="test")
    assert source.train.labels.tolist() == [76, 101, 0, 4] and source.val.labels.tolist() == [5, 8]
    assert abs(source.train[2][0].getpixel((1, 1))[0] - 80) <= 1


def test_a_missing_image_is_named(tmp_path):
    food101(tmp_path)
    with pytest.raises(UnreadableImage, match=r"got .*food-101/images/dish_000/test0.jpg"):
        NamedSet("food101", tmp_path, download=False).val[0]


def test_without_a_network_it_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*given, **named):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    message = (
        r"data.root: cifar10 is not in .* and could not be downloaded \(.*service not known.*\); run once with a "
        "network, or set data.root to a folder that holds cifar-10-batches-py"
    )
    with pytest.raises(ValueError, match=message):
        NamedSet("cifar10", tmp_path).train  # noqa: B018
    with pytest.raises(
        ValueError, match=r"data.root: pets is not in .* and Dataset not found; run once with a network"
    ):
        NamedSet("pets", tmp_path, train="trainval", download=False).train  # noqa: B018


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cifar"}, r"data.source: name must be one of cifar10, .*, got 'cifar'; choose one of them"),
        ({"name": "cifar10", "download": "no"}, r"data.source: download must be true or false, got 'no'"),
    ],
)
def test_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        NamedSet(**settings)


def test_a_split_that_it_has_not(tmp_path, unchecked):
    cifar10(tmp_path)
    with pytest.raises(ValueError, match=r"data.source: cifar10 has the splits train and test, got val; choose one"):
        NamedSet("cifar10", tmp_path, val="val").val  # noqa: B018
    with pytest.raises(ValueError, match=r"data.source: food101 cannot be opened so: .*'val'.*split"):
        NamedSet("food101", tmp_path, val="val").val  # noqa: B018
