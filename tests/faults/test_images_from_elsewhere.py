"""Images that somebody else sent: known by their bytes, of a list of formats, and from the files of the data set."""

import io
import json
import os
import socket
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from conf.errors import UserError
from conf.folders import EXTENSIONS
from data.sources.decode import UnreadableImage, read_image
from data.sources.form import Form
from data.sources.formats import FORMATS, image_of
from data.sources.huggingface import HuggingFace
from data.sources.imagefolder import FolderSplit, ImageFolder
from data.token_labels import LabelMaps, UnreadableTokenLabels

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
OTHERS = {
    "PostScript": POSTSCRIPT,
    "PostScript in a DOS shell": struct.pack("<IIIIIIIH", 0xC6D3D0C5, 30, len(POSTSCRIPT), 0, 0, 0, 0, 0) + POSTSCRIPT,
    "Windows metafile": b"\xd7\xcd\xc6\x9a\x00\x00"
    + struct.pack("<hhhhHI", 0, 0, 9, 9, 96, 0)
    + b"\x01\x00\x09\x00" * 9,
    "FITS": b"SIMPLE  =                    T" + b" " * 3000,
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(99),
    "PDF": b"%PDF-1.4\n",
    "MPEG": b"\x00\x00\x01\xb3" + bytes(99),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "HTML": b"<html>",
}


@pytest.fixture
def no_program(monkeypatch):
    """Fails where another program would be started."""

    def started(*arguments, **options):
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr("subprocess.Popen", started)
    monkeypatch.setattr(os, "system", started)


@pytest.mark.case(38)
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("form", [Form(3, "uint8"), Form(4, "uint8")], ids=["plain", "array"])
def test_other_formats_are_no_images_whatever_they_are_called(tmp_path, no_program, name, form):
    file = tmp_path / "picture.jpg"
    file.write_bytes(OTHERS[name])
    for given in (file, OTHERS[name]):
        with pytest.raises(UnreadableImage, match="UnidentifiedImageError"):
            read_image(given, "picture.jpg", form=form)


def test_every_suffix_that_is_taken_for_an_image_has_its_format():
    Image.init()
    known = {Image.EXTENSION.get(suffix) for suffix in EXTENSIONS if suffix != ".npy"} - {None}
    assert known <= {*FORMATS, "MPO"}
    assert not {"EPS", "WMF", "PDF", "FPX", "MIC", "SPIDER", "IPTC"} & {*FORMATS}


def test_what_is_read_is_what_pillow_reads(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 9, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "bmp", "gif", "webp", "tiff", "ppm", "tga", "pcx", "sgi", "ico", "jp2"):
        file = tmp_path / f"a.{suffix}"
        picture.save(file)
        with Image.open(file) as usual, image_of(file) as ours:
            assert usual.format == ours.format
            assert np.array_equal(np.asarray(usual.convert("RGB")), np.asarray(ours.convert("RGB")))


@pytest.mark.case(38)
@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device"])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    file = Path("a.png")
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a device":
        file.symlink_to("/dev/zero")
    else:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(file))
    for form in (Form(3, "uint8"), Form(1, "uint16")):
        with pytest.raises(UnreadableImage, match=r"got a\.png \(OSError: "):
            read_image(file, form=form)


@pytest.mark.case(37)
@pytest.mark.parametrize(
    ("shape", "kind"), [((10**6, 10**6), "<f4"), ((2**40,), "<f4"), ((3, 2), "<f4"), ((2**40,), "|V0")]
)
def test_an_array_that_claims_more_than_it_holds_is_not_made(tmp_path, shape, kind):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
    (tmp_path / "a.npy").write_bytes(stream.getvalue() + bytes(8))
    with pytest.raises(UnreadableImage, match=r"an array of \(.*\) (float32|\|V0) in \d+ bytes"):
        read_image(tmp_path / "a.npy", form=Form(1, "float32"))


@pytest.mark.case(34)
@pytest.mark.case(37)
@pytest.mark.parametrize(
    ("unpacked", "said"), [(64 * 2**20, "strips hold more than the 1280 bytes"), (8, "ValueError")]
)
def test_a_tiff_that_unpacks_into_more_than_its_pixels_is_not_unpacked(tmp_path, unpacked, said):
    tags = TiffImagePlugin.ImageFileDirectory_v2(b"II*\0\x08\0\0\0")
    packed = zlib.compress(bytes(unpacked))
    # Pillow adds to 0, the place of the only strip, where it puts what is behind the tags
    found = {256: 16, 257: 16, 258: (8,) * 5, 259: 8, 277: 5, 273: 0, 279: len(packed)}
    for tag, value in found.items():
        tags[tag] = value
    file = tmp_path / "a.tif"
    file.write_bytes(b"II*\0\x08\0\0\0" + tags.tobytes(8) + packed)
    with pytest.raises(UnreadableImage, match=said):
        read_image(file, form=Form(5, "uint8"))


@pytest.mark.case(34)
@pytest.mark.case(37)
def test_a_label_map_that_unpacks_into_gigabytes_is_not_unpacked(tmp_path):
    (tmp_path / "set/ant").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "set/ant/0.png")
    (tmp_path / "maps/ant").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "maps/ant/0.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("scores.npy", "classes.npy"):
            archive.writestr(name, bytes(33 * 2**20))
    maps = LabelMaps(tmp_path / "maps", FolderSplit(str(tmp_path / "set"), ["ant"]), 1)
    with pytest.raises(UnreadableTokenLabels, match="bytes unpacked"):
        maps.read(0)


def encoded() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A Parquet file, of which the last row names a file in place of an image."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    (tmp_path / "private.png").write_bytes(encoded())
    images = [{"bytes": encoded(), "path": "a.png"}, {"bytes": None, "path": str(tmp_path / "private.png")}]
    columns = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    table = arrow.table({"image": arrow.array(images, type=columns), "label": arrow.array([0, 1])})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}).to_dict()
    said = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    parquet.write_table(table.replace_schema_metadata(said), tmp_path / "x.parquet")
    return tmp_path


@pytest.mark.case(36)
@pytest.mark.parametrize("streaming", [True, False])
def test_a_row_that_names_a_file_is_not_read(rows, streaming):
    files = {"train": str(rows / "x.parquet"), "validation": str(rows / "x.parquet")}
    source = HuggingFace("parquet", data_files=files, streaming=streaming, cache_dir=str(rows / "cache"))
    assert source.train[0][0].getpixel((0, 0)) == (200, 0, 0)
    with pytest.raises(UnreadableImage, match=r"a row must hold its image, .*private\.png"):
        source.train[1]


@pytest.mark.case(36)
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_that_names_an_address_asks_nobody(rows, name, streaming):
    said = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {}\n"
    text = "---\nlicense_link: https://x.org\n{}---\nSee https://x.org\n" if name == "README.md" else "{}"
    folder = rows / "folder"
    folder.mkdir()
    (rows / "x.parquet").rename(folder / "x.parquet")
    source = [HuggingFace(str(folder), val_fraction=0.5, streaming=streaming, cache_dir=str(rows / "c")) for _ in "ab"]
    (folder / name).write_text(text.format(said.format("http://127.0.0.1:9/x.parquet")))
    with pytest.raises(UserError, match=r"a folder must hold its files, got addresses in "):
        len(source[0].train)
    (folder / name).write_text(text.format(said.format("x.parquet")))
    assert len(source[1].train) + len(source[1].val) == 2


@pytest.mark.case(36)
def test_rows_of_a_folder_of_images_name_files_in_it_and_no_others(rows):
    for part in ("train", "test"):
        for name in ("a", "b"):
            (rows / "pictures" / part / name).mkdir(parents=True)
            (rows / "pictures" / part / name / "0.png").write_bytes(encoded())
    source = HuggingFace("imagefolder", data_dir=str(rows / "pictures"), val="test", cache_dir=str(rows / "cache"))
    assert source.train[0][0].size == (8, 8)
    split = source.train
    split.rows = [{split.image: {"bytes": None, "path": str(rows / "pictures" / ".." / "private.png")}}]
    with pytest.raises(UnreadableImage, match="a row must hold its image"):
        split[0]


@pytest.mark.case(36)
@pytest.mark.parametrize("file", ["../../private.png", "/etc/passwd"])
def test_the_split_of_a_stranger_names_no_file_outside_the_root(tmp_path, file):
    (tmp_path / "set/ant").mkdir(parents=True)
    (tmp_path / "set/ant/0.png").write_bytes(encoded())
    (tmp_path / "split.csv").write_text(f"file,class,label,split\nant/0.png,ant,0,train\n{file},ant,0,val\n")
    source = ImageFolder(tmp_path / "set", split=tmp_path / "split.csv")
    with pytest.raises(ValueError, match="files must lie below the root, got"):
        len(source.val)


def test_no_module_of_ours_opens_images_or_arrays_otherwise():
    """Only `data.sources.formats` knows Pillow's way, with a list of formats."""
    root = Path(sys.modules["data.sources.formats"].__file__).parents[2]
    files = [file for folder in ("conf", "data", "kernels", "models") for file in (root / folder).rglob("*.py")]
    opening = [str(file.relative_to(root)) for file in files if "Image.open(" in file.read_text(encoding="utf-8")]
    assert opening == ["data/sources/formats.py"]
