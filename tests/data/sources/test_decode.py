"""Every kind of file becomes 8-bit RGB, or an error that names it."""

import io

import numpy as np
import pytest
from PIL import Image

from data.sources.decode import UnreadableImage, read_image, to_rgb

GREY = np.array([[0, 100], [200, 255]], np.uint8)


def save(image, path, **options):
    image.save(path, **options)
    return path


@pytest.mark.case(39)
@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "RGB"])
def test_modes_keep_their_colour(tmp_path, mode):
    level = 255 if mode == "1" else 153  # a level of the palette
    image = Image.new("RGB", (3, 2), (level,) * 3).convert(mode)
    read = read_image(save(image, tmp_path / ("a.tif" if mode == "CMYK" else "a.png")))
    assert read.mode == "RGB" and read.size == (3, 2)
    assert np.abs(np.asarray(read).astype(int) - level).max() <= 1


@pytest.mark.case(40)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_saturated(tmp_path, suffix):
    path = save(Image.fromarray(GREY.astype(np.uint16) * 257), tmp_path / f"a.{suffix}")
    assert np.array_equal(np.asarray(read_image(path))[..., 1], GREY)


def test_palette_with_transparency_drops_the_alpha(tmp_path, recwarn):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    path = save(image, tmp_path / "a.png", transparency=b"\x00\x80")
    assert read_image(path).getpixel((0, 0)) == (10, 20, 30)
    assert not list(recwarn)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    path = save(frames[0], tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert read_image(path).getpixel((0, 0)) == (255, 0, 0)


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert read_image(save(Image.new("RGB", (4, 2)), tmp_path / "a.jpg", exif=exif)).size == (4, 2)


def test_bytes(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (4, 2), "red").save(file, "PNG")
    assert read_image(file.getvalue()).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(UnreadableImage, match="got row 7"):
        read_image(b"nonsense", "row 7")


@pytest.mark.case(38)
def test_unreadable_files_are_named(tmp_path):
    whole = save(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), tmp_path / "a.jpg")
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:1000])
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "empty.png").touch()
    for name in ("cut.jpg", "page.jpg", "empty.png", "missing.png"):
        with pytest.raises(UnreadableImage, match=rf"read_image: unreadable image, got .*/{name} \(.*on_error=skip"):
            read_image(tmp_path / name)


@pytest.mark.case(41)
def test_decompression_bomb_is_unreadable(tmp_path, monkeypatch):
    path = save(Image.new("1", (100, 100)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(UnreadableImage, match=r"got .*bomb.png \(DecompressionBombError"):
        read_image(path)


@pytest.mark.case(40)
def test_float_pixels_are_refused(tmp_path):
    with pytest.raises(UnreadableImage, match="floating-point pixels have no fixed range, got mode F"):
        read_image(save(Image.new("F", (2, 2), 0.5), tmp_path / "a.tif"))


def test_32_bit_pixels_are_refused():
    with pytest.raises(ValueError, match="integer pixels outside 16 bits, got 70000 to 70000; save the image"):
        to_rgb(Image.new("I", (2, 2), 70000))
