import io

import numpy as np
import pytest
from PIL import Image

from abkd.data.decoding import Unreadable, fitted, height_x_width, pixels, read_rgb, read_size

RGB = np.random.RandomState(0).randint(0, 256, (6, 8, 3), dtype=np.uint8)
ALPHA = np.full((6, 8), 7, dtype=np.uint8)


def encoded(array, form="PNG", mode=None, **options):
    stream = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize("form", ["PNG", "BMP", "WEBP"])
def test_a_file_and_its_bytes_give_its_pixels(tmp_path, form):
    data = encoded(RGB, form, **({"lossless": True} if form == "WEBP" else {}))
    (tmp_path / "image").write_bytes(data)
    for source in (data, tmp_path / "image"):
        found, is_grey = pixels(source)
        assert np.array_equal(found, RGB) and found.dtype == np.uint8 and not is_grey
    assert read_size(tmp_path / "image") == (6, 8)


def test_a_jpeg_is_about_its_pixels():
    smooth = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None] * 3, (64, 64, 3))
    found, _ = pixels(encoded(np.ascontiguousarray(smooth), "JPEG", quality=95))
    assert np.abs(found.astype(int) - smooth).max() <= 4


@pytest.mark.parametrize(
    ("array", "mode", "is_grey"),
    [
        (RGB[..., 0], None, True),
        (np.dstack([RGB[..., 0], ALPHA]), None, True),
        (RGB[..., 0], "1", True),
        (np.dstack([RGB, ALPHA]), None, False),
        (RGB, "P", False),
    ],
    ids=["L", "LA", "1", "RGBA", "P"],
)
def test_modes_become_three_channels(array, mode, is_grey):
    found, said = pixels(encoded(array, mode=mode))
    assert found.shape == (6, 8, 3) and said == is_grey
    assert (found == found[..., :1]).all() == is_grey
    if mode is None:
        colours = array[..., :1] if is_grey and array.ndim == 3 else array[..., :3] if array.ndim == 3 else array
        assert np.array_equal(found, np.broadcast_to(colours.reshape(6, 8, -1), (6, 8, 3)))


def test_a_palette_with_transparency_is_read_without_a_warning():
    found, is_grey = pixels(encoded(RGB, mode="P", transparency=b"\x00" * 256))
    assert found.shape == (6, 8, 3) and not is_grey


def test_an_image_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees clockwise
    (tmp_path / "image.png").write_bytes(encoded(RGB, exif=exif))
    assert np.array_equal(pixels(tmp_path / "image.png")[0], np.rot90(RGB, -1))
    assert read_size(tmp_path / "image.png") == (8, 6)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"", "cannot identify"),
        (b"no image", "cannot identify"),
        (encoded(RGB)[:-30], "truncated|broken|Truncated|unrecognized"),
        (encoded(RGB.astype(np.uint16)[..., 0]), "mode I;16 is not 8 bits"),
        (RGB.astype(float), r"float64 \[6, 8, 3\]"),
        (RGB[None], r"uint8 \[1, 6, 8, 3\]"),
        (RGB[..., :2], r"uint8 \[6, 8, 2\]"),
    ],
    ids=["empty", "text", "torn", "16 bits", "float", "batch", "two channels"],
)
def test_what_is_no_image_is_unreadable(source, reason):
    with pytest.raises(Unreadable, match=reason):
        pixels(source)


def test_a_missing_file_is_unreadable(tmp_path):
    for read in (read_rgb, read_size):
        with pytest.raises(Unreadable, match="No such file"):
            read(tmp_path / "none.png")


@pytest.mark.parametrize("array", [RGB[..., 0], RGB[..., :1]])
def test_an_array_in_grey_becomes_three_channels(array):
    found, is_grey = pixels(array)
    assert is_grey and np.array_equal(found, np.dstack([RGB[..., 0]] * 3))


@pytest.mark.parametrize("kind", ["file", "array", "grey array"])
def test_size_takes_the_square_in_the_middle(kind):
    """Of 4 x 8 the columns 2 to 5; halved, each pixel is about the mean of four, not one of them."""
    image = np.zeros((4, 8, 3), dtype=np.uint8)
    image[:, ::2] = 200
    image[:, :2] = image[:, 6:] = 255
    source = {"file": encoded(image), "array": image, "grey array": image[..., 0]}[kind]
    found, _ = pixels(source, 2)
    assert found.shape == (2, 2, 3) and np.abs(found.astype(int) - 100).max() < 40
    assert np.array_equal(pixels(source, 4)[0], image[:, 2:6])


def test_an_image_that_fits_is_left_alone():
    image = Image.fromarray(RGB[:, :6])
    assert fitted(image, 6) is image


def test_sizes_are_height_then_width():
    assert height_x_width(RGB) == "6 x 8"
