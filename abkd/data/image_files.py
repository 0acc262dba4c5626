"""Images for classification, out of whatever holds them. Imports no torch.

Every format becomes the same rows, (origin, image, label); what is checked and how it is decoded is said once.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from abkd.data.cifar_files import find_cifar, read_cifar
from abkd.data.decoding import Unreadable, height_x_width, pixels
from abkd.data.image_arrays import read_mosaics, read_npz
from abkd.data.labelled_images import LabelledImages, Source, check_every_class
from abkd.data.sources import FORMATS, SPLIT_NAMES, read_table
from abkd.errors import InputError
from abkd.paths import find_path

IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "fine_label", "labels")


def read_images(
    path: str,
    field: str,
    *,
    split: str,
    subset: str = "",
    image_column: str = "",
    label_column: str = "",
    size: int | None = None,
    on_corrupt: Literal["refuse", "skip"] = "refuse",
) -> LabelledImages:
    """The images of a split as one array.

    Args:
        path: as in a recipe: CIFAR's "python version" (folder or .tar.gz), a folder CLASS/IMAGE or SPLIT/CLASS/IMAGE,
            a folder of mosaics, an .npz, a table of images (file, folder, saved data set, hub id owner/name).
        split: train, validation or test; of what has no splits, everything is read.
        subset: of a hub's data set.
        image_column, label_column: of a table; "" finds `image` or `img`, and `label`, `fine_label` or `labels`.
        size: pixels; every image becomes `size` x `size`, the square in its middle, bicubic with antialiasing.
        on_corrupt: a single image that cannot be read is an error, or left out and counted.

    Returns:
        Classes in the order that the data state; else their names sorted, or "0", "1", ... where labels are numbers.

    Raises:
        InputError: nothing of this is at `path`; it has no such split; an image cannot be read, or differs in size from
            the first without `size`; a label is none of the classes; a class has no image.
    """
    source = _open(path, field, split, subset, (image_column, label_column))
    images: list[np.ndarray] = []
    labels: list[Any] = []
    origins: list[str] = []
    num_grey = num_skipped = 0
    for origin, image, label in tqdm(source.rows, desc="images", unit="image", leave=False):
        try:
            rgb, is_grey = pixels(image, size)
        except Unreadable as error:
            if on_corrupt == "refuse":
                raise InputError(
                    f"{field}: {origin} cannot be read ({error}); mend it, or set data.on_corrupt=skip to leave it out"
                ) from None
            num_skipped += 1
            continue
        if images and rgb.shape != images[0].shape:
            here, first = height_x_width(rgb), height_x_width(images[0])
            raise InputError(f"{field}: {origin} is {here}, {origins[0]} {first} pixels; set data.image_size")
        images.append(rgb)
        labels.append(label)
        origins.append(origin)
        num_grey += is_grey
    if not images:
        raise InputError(f"{field}: {source.origin} has no image ({num_skipped} could not be read); give another split")
    classes = source.classes or _classes(labels)
    numbers = _numbered(labels, classes, origins, field)
    check_every_class(numbers, classes, source.origin, field)
    return LabelledImages(np.stack(images), numbers, classes, num_skipped, num_grey, source.origin)


def list_images(path: str, field: str, *, split: str) -> tuple[list[Path], np.ndarray, tuple[str, ...]]:
    """(files, labels int64 `[N]`, classes) of a folder CLASS/IMAGE or SPLIT/CLASS/IMAGE, without opening any.

    Raises:
        InputError: it is none; it has no such split; a class has no image.
    """
    source = _class_folders(find_path(path, field), field, split)
    rows = list(source.rows)
    classes = source.classes or ()
    labels = np.array([label for _, _, label in rows], dtype=np.int64)
    check_every_class(labels, classes, source.origin, field)
    return [file for _, file, _ in rows], labels, classes


def _open(path: str, field: str, split: str, subset: str, columns: tuple[str, str]) -> Source:
    found = find_path(path, field)
    cifar = find_cifar(found, field) if found.exists() else None
    if cifar is not None:
        return read_cifar(cifar, field, split)
    if found.suffix == ".npz":
        return read_npz(found, field, split)
    if (found / "labels.json").exists():
        return read_mosaics(found, field, split)
    if found.is_dir() and not _has_table(found):
        return _class_folders(found, field, split)
    if found.is_file() and not found.name.endswith(FORMATS):
        raise InputError(
            f"{field}: {found} is no {', '.join(FORMATS)}, .npz or .tar.gz; give one, or a folder CLASS/IMAGE"
        )
    return _table(path, field, split, subset, columns)


def _has_table(folder: Path) -> bool:
    return any(name.endswith(FORMATS) for _, _, names in os.walk(folder) for name in names)


def _class_folders(folder: Path, field: str, split: str) -> Source:
    if not folder.is_dir():
        raise InputError(f"{field}: there is no folder {str(folder)!r}; give a folder CLASS/IMAGE")
    names = {name for names in SPLIT_NAMES.values() for name in names}
    splits = [child.name for child in _folders(folder) if child.name in names and _folders(child)]
    origin = str(folder)
    if splits:
        chosen = [name for name in SPLIT_NAMES.get(split, (split,)) if name in splits]
        if not chosen:
            raise InputError(f"{field}: {folder} has no split {split!r}; it has {', '.join(splits)}")
        folder, origin = folder / chosen[0], f"{folder} [{chosen[0]}]"
    classes = [child.name for child in _folders(folder)]
    if not classes:
        raise InputError(
            f"{field}: {folder} holds no images as CLASS/IMAGE, no table ({', '.join(FORMATS)}), no CIFAR, no mosaics"
        )
    rows = (
        (str(file), file, label)
        for label, name in enumerate(classes)
        for file in sorted((folder / name).rglob("*"))
        if file.suffix.lower() in IMAGE_FILES and not file.name.startswith(".")
    )
    return Source(rows, tuple(classes), origin)


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith((".", "__")))


def _table(path: str, field: str, split: str, subset: str, columns: tuple[str, str]) -> Source:
    table = read_table(path, field, subset=subset, split=split)
    first = next(table.rows, None)
    if first is None:
        raise InputError(f"{field}: {path} [{split}] has no row")
    present = list(dict.fromkeys([*table.features, *first[1]]))
    image_column = _column(present, "image_column", columns[0], IMAGE_COLUMNS, f"{field}: {path}")
    label_column = _column(present, "label_column", columns[1], LABEL_COLUMNS, f"{field}: {path}")
    folder = find_path(path, field).parent

    def rows() -> Iterator[tuple[str, Any, Any]]:
        for origin, row in itertools.chain([first], table.rows):
            if label_column not in row:
                raise InputError(f"{field}: {origin} has no {label_column!r}; give every row one")
            yield origin, _cell(row.get(image_column), folder), row[label_column]

    names = table.features.get(label_column, {}).get("names")
    return Source(rows(), None if names is None else tuple(names), table.origin)


def _column(present: Sequence[str], option: str, chosen: str, usual: Sequence[str], place: str) -> str:
    found = [name for name in ((chosen,) if chosen else usual) if name in present]
    if not found:
        wanted = repr(chosen) if chosen else " or ".join(usual)
        raise InputError(f"{place} has no column {wanted}; it has {', '.join(present)}: set data.{option}")
    return found[0]


def _cell(value: Any, folder: Path) -> Any:
    """The image in a cell as `pixels` takes it: the bytes of a file, the path of one, or its pixels."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return folder / value
    if isinstance(value, list):
        array = np.asarray(value)
        is_bytes = array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() <= 255
        return array.astype(np.uint8) if is_bytes else array
    return value or b""


def _classes(labels: Sequence[Any]) -> tuple[str, ...]:
    """Of labels that say nothing of them: names sorted, or the numbers up to the largest."""
    numbers = [label for label in labels if isinstance(label, int)]
    if numbers:
        return tuple(str(number) for number in range(max(numbers) + 1))
    return tuple(sorted({label for label in labels if isinstance(label, str)}))


def _numbered(labels: Sequence[Any], classes: Sequence[str], origins: Sequence[str], field: str) -> np.ndarray:
    by_name = {name: number for number, name in enumerate(classes)}
    numbers = np.empty(len(labels), dtype=np.int64)
    for place, label in enumerate(labels):
        number = by_name.get(label) if isinstance(label, str) else label
        if not isinstance(number, int) or not 0 <= number < len(classes):
            raise InputError(f"{field}: {origins[place]} has the label {label!r}, none of the {len(classes)} classes")
        numbers[place] = number
    return numbers
