"""Many images in one file: mosaics, and arrays of numpy. Imports no torch."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from abkd.data.decoding import Unreadable, height_x_width, pixels
from abkd.data.labelled_images import Source, check_counts
from abkd.data.sources import SPLIT_NAMES
from abkd.errors import InputError

MOSAIC_ROWS, MOSAIC_COLUMNS = 25, 40


def read_mosaics(folder: Path, field: str, split: str) -> Source:
    """SPLIT_00.webp, ...: 25 x 40 images each, row by row; labels.json: {"classes": [...], SPLIT: [label, ...]}."""
    try:
        content = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        labels, classes = content.get(split), tuple(content["classes"])
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{field}: {folder / 'labels.json'} cannot be read ({error})") from None
    if labels is None:
        has = ", ".join(name for name in content if name != "classes")
        raise InputError(f"{field}: {folder} has no split {split!r}; it has {has}")
    files = sorted(folder.glob(f"{split}_*.webp"))
    origin = f"{folder} [{split}]"
    check_counts(len(files) * MOSAIC_ROWS * MOSAIC_COLUMNS, len(labels), origin, field)
    tiles = (tile for file in files for tile in _tiles(file, field))
    return Source(((where, tile, label) for (where, tile), label in zip(tiles, labels, strict=True)), classes, origin)


def _tiles(file: Path, field: str) -> Iterator[tuple[str, np.ndarray]]:
    try:
        mosaic, _ = pixels(file)
    except Unreadable as error:
        raise InputError(f"{field}: {file} cannot be read ({error}); copy it again") from None
    height, width = mosaic.shape[0] // MOSAIC_ROWS, mosaic.shape[1] // MOSAIC_COLUMNS
    if mosaic.shape[:2] != (MOSAIC_ROWS * height, MOSAIC_COLUMNS * width):
        raise InputError(
            f"{field}: {file} is {height_x_width(mosaic)} pixels, no {MOSAIC_ROWS} x {MOSAIC_COLUMNS} images"
        )
    tiles = mosaic.reshape(MOSAIC_ROWS, height, MOSAIC_COLUMNS, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)
    for number, tile in enumerate(tiles):
        yield f"{file} image {number}", tile


def read_npz(path: Path, field: str, split: str) -> Source:
    """Keys `images`, `labels`; or with the split in the key, as MedMNIST and Keras write them; `classes` if any."""
    split_names = SPLIT_NAMES.get(split, (split,))
    pairs = [(f"{name}_images", f"{name}_labels") for name in split_names]
    pairs += [(f"x_{name}", f"y_{name}") for name in split_names] + [("images", "labels")]
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            present = list(stored)
            chosen = next((pair for pair in pairs if set(pair) <= set(present)), None)
            arrays = [stored[name] for name in chosen or ()]
            classes = tuple(map(str, stored["classes"])) if "classes" in present else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{field}: {path} cannot be read ({error}); write it with numpy.savez, no objects") from None
    if chosen is None:
        raise InputError(f"{field}: {path} has {', '.join(present)}; give it images and labels, of {split!r} or of all")
    images, labels = arrays
    check_counts(len(images), labels.size, str(path), field)
    origins = [f"{path} image {number}" for number in range(len(images))]
    origin = str(path) if chosen == ("images", "labels") else f"{path} [{split}]"
    return Source(zip(origins, images, labels.ravel().tolist(), strict=True), classes, origin)
