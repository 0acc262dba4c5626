"""CIFAR-10 and CIFAR-100 as their site gives them, the "python version": a folder, or its .tar.gz as downloaded.

The files are pickles, which could run any code: `_Unpickler` admits plain containers and numpy arrays, nothing else.

Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009; keys as the data set's page says.
"""

import io
import pickle
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from abkd.data.labelled_images import Source, check_counts
from abkd.errors import InputError

EDGE = 32
"""pixels"""
FOLDERS = ("cifar-10-batches-py", "cifar-100-python")
"""What the archives unpack to."""


@dataclass(frozen=True)
class Layout:
    """Which file and which key holds what."""

    meta: str
    names_key: str
    labels_key: str
    splits: dict[str, tuple[str, ...]]
    """Split -> its files."""


CIFAR10 = Layout(
    meta="batches.meta",
    names_key="label_names",
    labels_key="labels",
    splits={"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
)
CIFAR100 = Layout(
    meta="meta",
    names_key="fine_label_names",
    labels_key="fine_labels",
    splits={"train": ("train",), "test": ("test",)},
)


class Cifar(NamedTuple):
    """What stands at a path."""

    path: Path
    layout: Layout
    files: dict[str, Path | bytes]
    """Name -> the file, or its bytes."""


def find_cifar(path: Path, field: str) -> Cifar | None:
    """The CIFAR data set at `path`, a folder or an archive; None where something else is.

    Raises:
        InputError: the archive is torn.
    """
    if path.is_dir():
        path = next((path / name for name in FOLDERS if (path / name).is_dir()), path)
        files: dict[str, Path | bytes] = {file.name: file for file in path.iterdir() if file.is_file()}
    else:
        files = dict(_unpacked(path, field)) if path.name.endswith((".tar.gz", ".tgz")) else {}
    for layout in (CIFAR10, CIFAR100):
        if layout.meta in files:
            return Cifar(path, layout, files)
    return None


def read_cifar(found: Cifar, field: str, split: str) -> Source:
    """Images uint8 `[32, 32, 3]`; of CIFAR-100 the fine labels.

    Raises:
        InputError: a file is missing, torn, or holds anything but arrays and containers; labels and images differ in
            number.
    """
    names = found.layout.splits.get(split)
    if names is None:
        raise InputError(f"{field}: {found.path} has no split {split!r}; it has train, test")
    batches = {name: _content(found, name, field) for name in names}
    classes = _content(found, found.layout.meta, field).get(found.layout.names_key, [])
    return Source(_rows(found, batches, field), tuple(map(_text, classes)), f"{found.path} [{split}]")


def _rows(found: Cifar, batches: dict[str, Any], field: str) -> Iterator[tuple[str, np.ndarray, int]]:
    for name, batch in batches.items():
        data, labels = batch.get("data"), batch.get(found.layout.labels_key, [])
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3 * EDGE * EDGE,):
            raise InputError(f"{field}: {found.path / name} has no uint8 images of {EDGE} x {EDGE}; download it again")
        check_counts(len(data), len(labels), str(found.path / name), field)
        images = data.reshape(-1, 3, EDGE, EDGE).transpose(0, 2, 3, 1)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield f"{found.path / name} image {number}", image, label


def _content(found: Cifar, name: str, field: str) -> dict[str, Any]:
    if name not in found.files:
        raise InputError(f"{field}: {found.path} has no file {name!r}; download it again")
    file = found.files[name]
    try:
        content = _Unpickler(io.BytesIO(file if isinstance(file, bytes) else file.read_bytes())).load()
        return {_text(key): value for key, value in content.items()}
    except Exception as error:  # a torn pickle raises of any kind, and nothing that it names is run
        raise InputError(f"{field}: {found.path / name} cannot be read ({error}); download it again") from None


def _unpacked(path: Path, field: str) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is not None:
                    yield Path(member.name).name, stream.read()
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise InputError(f"{field}: {path} cannot be unpacked ({error}); download it again") from None


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _array(kind: type, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """What numpy's own `_reconstruct` does for the array that every pickled array begins as."""
    if kind is not np.ndarray:
        raise pickle.UnpicklingError(f"an array of type {kind!r}")
    return np.ndarray.__new__(np.ndarray, shape, code.decode())


def _latin(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into a pickle of Python 2."""
    return text.encode("latin-1")


class _Unpickler(pickle.Unpickler):
    ADMITTED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): _array,
        ("numpy._core.multiarray", "_reconstruct"): _array,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin,
    }

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no image file does")
        return self.ADMITTED[module, name]
