import json

import numpy as np
import pytest
from PIL import Image

from abkd import InputError
from abkd.data.image_files import read_images

RANDOM = np.random.RandomState(0)
TILES = RANDOM.randint(0, 256, (2000, 2, 3, 3), dtype=np.uint8)
LABELS = RANDOM.randint(0, 3, 2000)
CLASSES = ["ant", "bee", "cat"]


def write_mosaics(folder, tiles=TILES):
    """Pasted tile by tile: 40 in a row, 25 rows."""
    for number in range(len(tiles) // 1000):
        mosaic = Image.new("RGB", (40 * tiles.shape[2], 25 * tiles.shape[1]))
        for place, tile in enumerate(tiles[1000 * number : 1000 * (number + 1)]):
            mosaic.paste(Image.fromarray(tile), (place % 40 * tiles.shape[2], place // 40 * tiles.shape[1]))
        mosaic.save(folder / f"train_{number:02}.webp", lossless=True)
    (folder / "labels.json").write_text(json.dumps({"classes": CLASSES, "train": LABELS.tolist(), "test": []}))
    return str(folder)


def test_mosaics_hold_images_of_any_size_row_by_row(tmp_path):
    found = read_images(write_mosaics(tmp_path), "data.train", split="train")
    assert np.array_equal(found.images, TILES) and np.array_equal(found.labels, LABELS)
    assert (found.classes, found.num_grey, found.origin) == (tuple(CLASSES), 0, f"{tmp_path} [train]")


def test_a_missing_split_is_named(tmp_path):
    with pytest.raises(InputError, match=r"has no split 'validation'; it has train, test"):
        read_images(write_mosaics(tmp_path), "data.validation", split="validation")


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"\[test\] has no image"):
        read_images(write_mosaics(tmp_path), "data.test", split="test")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "train_01.webp").unlink(), r"\[train\] has 1000 images and 2000 labels"),
        (lambda f: (f / "train_01.webp").write_bytes(b"torn"), r"train_01\.webp cannot be read"),
        (lambda f: Image.new("RGB", (121, 50)).save(f / "train_01.webp"), r"is 50 x 121 pixels, no 25 x 40 images"),
        (lambda f: Image.new("RGB", (40, 25)).save(f / "train_01.webp"), r"train_01\.webp image 0 is 1 x 1, .* 2 x 3"),
        (lambda f: (f / "labels.json").write_text("{"), r"labels\.json cannot be read"),
        (lambda f: (f / "labels.json").write_text("{}"), r"labels\.json cannot be read"),
        (lambda f: (f / "labels.json").write_text("[]"), r"labels\.json cannot be read"),
    ],
)
def test_spoilt_mosaics_are_named(tmp_path, spoil, message):
    path = write_mosaics(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        read_images(path, "data.train", split="train")


@pytest.mark.parametrize(
    ("images", "labels"),
    [("images", "labels"), ("train_images", "train_labels"), ("x_train", "y_train")],
)
def test_npz_by_the_names_that_people_use(tmp_path, images, labels):
    others = {} if images == "images" else {images.replace("train", "test"): TILES, labels.replace("train", "test"): []}
    np.savez(tmp_path / "x.npz", **{images: TILES[:9], labels: LABELS[:9, None]}, **others)
    found = read_images(str(tmp_path / "x.npz"), "data.train", split="train")
    assert np.array_equal(found.images, TILES[:9]) and found.labels.tolist() == LABELS[:9].tolist()
    assert (found.classes, found.num_grey) == (("0", "1", "2"), 0)
    assert found.origin == str(tmp_path / "x.npz") + ("" if images == "images" else " [train]")


def test_npz_in_grey_with_names_of_classes(tmp_path):
    np.savez(tmp_path / "x.npz", images=TILES[:9, ..., 0], labels=LABELS[:9], classes=CLASSES)
    found = read_images(str(tmp_path / "x.npz"), "data.train", split="test")
    assert np.array_equal(found.images, TILES[:9, ..., :1].repeat(3, axis=3))
    assert (found.classes, found.num_grey) == (tuple(CLASSES), 9)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": TILES[:9], "labels": LABELS[:8]}, r"x\.npz has 9 images and 8 labels"),
        ({"images": TILES[:9] / 16, "labels": LABELS[:9]}, r"image 0 cannot be read \(it is float64 \[2, 3, 3\]"),
        ({"images": TILES[:9], "labels": LABELS[:9] / 1}, r"image 0 has the label [0-2]\.0, none of the 0"),
        ({"images": TILES[:9], "labels": LABELS[:9] - 1}, r"has the label -1, none of the 2 classes"),
        ({"images": TILES[:9], "labels": np.arange(1, 10)}, r"has no image of '0'"),
        ({"images": np.array([None] * 9), "labels": LABELS[:9]}, r"cannot be read .*no objects"),
        ({"test_images": TILES[:9], "test_labels": LABELS[:9]}, r"has test_images, test_labels; give it images"),
    ],
)
def test_spoilt_npz_is_named(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=rf"data\.train: .*{message}"):
        read_images(str(tmp_path / "x.npz"), "data.train", split="train")


@pytest.mark.parametrize("content", [None, b"", b"torn", b"PK\x03\x04torn"])
def test_a_missing_or_torn_npz_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"data\.train: .*x\.npz cannot be read"):
        read_images(str(tmp_path / "x.npz"), "data.train", split="train")
