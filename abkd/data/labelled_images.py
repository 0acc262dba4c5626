"""Labelled images in memory, and what is made of them: a validation split, few-label subsets, base and new classes.

Imports no torch. What is drawn here comes from numpy's `RandomState`, whose streams stay the same in every version.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from abkd.errors import InputError


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images of one size, each of one class."""

    images: np.ndarray
    """uint8 `[N, H, W, 3]`, RGB."""
    labels: np.ndarray
    """int64 `[N]`, indices into `classes`."""
    classes: tuple[str, ...]
    num_skipped: int = 0
    """Images that could not be read and were left out."""
    num_grey: int = 0
    """Images that were stored in grey: their three channels are equal."""
    origin: str = ""
    """Where they come from, for messages."""

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, indices: np.ndarray) -> "LabelledImages":
        """Those at `indices`, in that order. The counts stay those of the whole."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])


@dataclass(frozen=True, eq=False)
class ImageFiles(LabelledImages):
    """The same of files that are read when a batch asks for them: `images` holds their paths, an array of `[N]`."""

    size: int = 0
    """Images become `size` x `size` pixels."""


class Source(NamedTuple):
    """What the reader of a format gives."""

    rows: Iterable[tuple[str, Any, Any]]
    """(where it stands, the image as `abkd.data.decoding.pixels` takes it, its label: index or name)"""
    classes: tuple[str, ...] | None
    """None where they are not stated."""
    origin: str
    """Where it stands, with the split where that decides the images."""


def check_counts(num_images: int, num_labels: int, origin: str, field: str) -> None:
    """Raises InputError where they differ."""
    if num_images != num_labels:
        raise InputError(f"{field}: {origin} has {num_images} images and {num_labels} labels; give each image one")


def check_every_class(labels: np.ndarray, classes: Sequence[str], origin: str, field: str) -> None:
    """Raises InputError with the classes that have no image."""
    counts = np.bincount(labels, minlength=len(classes))
    missing = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if missing:
        raise InputError(
            f"{field}: {origin} has no image of {_listed(missing)}; add some, or take the class out of the list"
        )


def check_same_classes(train: LabelledImages, test: LabelledImages, field: str) -> None:
    """Raises InputError where the two number their classes differently, or are the same images."""
    if train.origin and train.origin == test.origin:
        raise InputError(f"{field}: {test.origin} is what is trained on; give images that are not")
    if train.classes == test.classes:
        return
    only_train, only_test = (
        sorted(set(train.classes) - set(test.classes)),
        sorted(set(test.classes) - set(train.classes)),
    )
    differences = [f"only there: {_listed(only_train)}"] if only_train else []
    differences += [f"only here: {_listed(only_test)}"] if only_test else []
    raise InputError(
        f"{field}: {test.origin or 'it'} has other classes than the training images "
        f"({'; '.join(differences) or 'the same in another order'}); give both the same classes"
    )


def split_off(train: LabelledImages, num: int, field: str) -> tuple[LabelledImages, LabelledImages]:
    """(the rest, `num` images held out): the same ones every time, as many of each class.

    Where `num` is no multiple of the number of classes, the first classes give one more.

    Raises:
        InputError: a class would keep no image.
    """
    num_classes = len(train.classes)
    per_class = [num // num_classes + (label < num % num_classes) for label in range(num_classes)]
    counts = np.bincount(train.labels, minlength=num_classes)
    for name, wanted, count in zip(train.classes, per_class, counts, strict=True):
        if wanted >= count:
            raise InputError(
                f"{field}={num} takes {wanted} images of each class, and {name!r} has {count}; lower it, or give "
                "a split"
            )
    held_out = _drawn(train.labels, per_class, seed=0)
    rest = np.setdiff1d(np.arange(len(train)), held_out)
    return train.at(rest), train.at(held_out)


def take_at_most(images: LabelledImages, num_per_class: int, seed: int) -> LabelledImages:
    """As `take_per_class`, and all of a class that has fewer, as the few shots of CoOp."""
    return images.at(_drawn(images.labels, [num_per_class] * len(images.classes), seed))


def take_per_class(images: LabelledImages, num_per_class: int, seed: int) -> LabelledImages:
    """`num_per_class` images of each class, drawn by `seed`: a few-label subset.

    Of one seed, a smaller subset is part of every larger one.

    Raises:
        InputError: `num_per_class` is below 1, or above what a class has.
    """
    return images.at(_drawn_per_class(images, num_per_class, "num_per_class", seed))


def keep_labels(images: LabelledImages, num_per_class: int, seed: int) -> np.ndarray:
    """bool `[N]`: which images keep their label where only `num_per_class` of each class do; drawn as `take_per_class`.

    Raises:
        InputError: as `take_per_class`.
    """
    kept = np.zeros(len(images), dtype=bool)
    kept[_drawn_per_class(images, num_per_class, "num_labelled_per_class", seed)] = True
    return kept


def base_and_new(classes: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(indices of the base classes, of the new ones): the first half, rounded up, and the others.

    Source: Zhou et al., "Conditional prompt learning for vision-language models", CVPR 2022, section 4.1: the classes
        in the data set's order, the first ceil(n / 2) base.
    """
    middle = -(-len(classes) // 2)
    return tuple(range(middle)), tuple(range(middle, len(classes)))


def select_classes(images: LabelledImages, indices: Sequence[int]) -> LabelledImages:
    """The images of these classes alone; class `indices[k]` becomes class k."""
    new_label = np.full(len(images.classes), -1)
    new_label[list(indices)] = np.arange(len(indices))
    labels = new_label[images.labels]
    chosen = replace(images, labels=labels, classes=tuple(images.classes[index] for index in indices))
    return chosen.at(np.flatnonzero(labels >= 0))


def _drawn_per_class(images: LabelledImages, num_per_class: int, field: str, seed: int) -> np.ndarray:
    counts = np.bincount(images.labels, minlength=len(images.classes))
    if not 1 <= num_per_class <= counts.min():
        fewest = images.classes[int(counts.argmin())]
        raise InputError(
            f"data.{field}={num_per_class} must be 1 to {counts.min()}, what {fewest!r}, the rarest class, has"
        )
    return _drawn(images.labels, [num_per_class] * len(images.classes), seed)


def _drawn(labels: np.ndarray, per_class: Sequence[int], seed: int) -> np.ndarray:
    """Ascending indices of `per_class[k]` images of class k: the first in an order that the seed decides."""
    order = np.random.RandomState(seed).permutation(len(labels))
    chosen = [order[labels[order] == label][:count] for label, count in enumerate(per_class)]
    return np.sort(np.concatenate(chosen))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
