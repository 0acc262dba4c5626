"""What an image classifier's recipe names, found, read and checked before torch is imported."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from abkd import config
from abkd.config.image_models import (
    CIFAR_100_MEAN,
    CIFAR_100_STD,
    CachedClassifier,
    CLIPSection,
    CLIPStudent,
    CLIPTeacher,
    ImageModel,
)
from abkd.data.clip_sets import base_and_new, read_split
from abkd.data.image_files import list_images, read_images
from abkd.data.labelled_images import (
    ImageFiles,
    LabelledImages,
    check_same_classes,
    keep_labels,
    split_off,
    take_at_most,
    take_per_class,
)
from abkd.errors import InputError
from abkd.models.classifiers import find_classifier
from abkd.models.pretrained import find_model
from abkd.paths import find_path
from abkd.teachers.cache.manifest import Manifest


class ImageInputs(NamedTuple):
    train: LabelledImages
    is_labelled: np.ndarray
    """bool `[N]`: whether a training image keeps its label."""
    validation: LabelledImages | None
    test: LabelledImages
    models: list[str]
    """What will be loaded, and from where."""

    @property
    def summary(self) -> str:
        unlabelled = len(self.train) - int(self.is_labelled.sum())
        parts = [f"{len(self.train):,} images of {len(self.train.classes)} classes to train on"]
        parts += [f"{unlabelled:,} of them without a label"] if unlabelled else []
        parts += [f"{len(self.validation):,} to validate with"] if self.validation else []
        parts += [f"{len(self.test):,} to test with"]
        for what, images in (("train", self.train), ("test", self.test)):
            parts += [f"{images.num_skipped:,} corrupt ones of {what} left out"] if images.num_skipped else []
            parts += [f"{images.num_grey:,} grey ones of {what} in three channels"] if images.num_grey else []
        return f"data: {', '.join(parts)}"


def check_image_inputs(recipe: config.ImageRecipe) -> ImageInputs:
    """Reads every image, or finds those that are decoded later, and looks at what there is of every model.

    Raises:
        InputError: something is missing, malformed or does not go together.
    """
    sections = {"teacher": recipe.teacher, "student": recipe.student}
    models = [_describe(section, field) for field, section in sections.items() if section is not None]
    read = _of_clip_set if recipe.data.clip_set else _of_classes
    train, is_labelled, validation, test = read(recipe.data)
    _check_batches(recipe, len(train))
    return ImageInputs(train, is_labelled, validation, test, models)


def _of_classes(data: Any) -> tuple[LabelledImages, np.ndarray, LabelledImages | None, LabelledImages]:
    """(to train on, whether each keeps its label, to validate with, to test with)"""
    how: dict[str, Any] = {
        "subset": data.subset,
        "image_column": data.image_column,
        "label_column": data.label_column,
        "size": data.image_size or None,
        "on_corrupt": data.on_corrupt,
    }
    if data.in_memory:
        train = read_images(data.train, "data.train", split=data.split, **how)
        test = read_images(data.test or data.train, "data.test", split=data.test_split, **how)
    else:
        train = _listed(data.train, "data.train", data.split, data.image_size)
        test = _listed(data.test or data.train, "data.test", data.test_split, data.image_size)
    check_same_classes(train, test, "data.test")
    validation = None
    if data.num_validation:
        train, validation = split_off(train, data.num_validation, "data.num_validation")
    if data.num_per_class:
        train = take_per_class(train, data.num_per_class, seed=0)
    is_labelled = np.ones(len(train), dtype=bool)
    if data.num_labelled_per_class:
        is_labelled = keep_labels(train, data.num_labelled_per_class, seed=0)
    return train, is_labelled, validation, test


def _listed(path: str, field: str, split: str, size: int) -> ImageFiles:
    files, labels, classes = list_images(path, field, split=split)
    return ImageFiles(np.array(files, dtype=object), labels, classes, origin=str(files[0].parent.parent), size=size)


def _of_clip_set(data: Any) -> tuple[LabelledImages, np.ndarray, None, LabelledImages]:
    """As `_of_classes`; of a teacher few images of the base classes, of a student all images without labels."""
    split = read_split(data.train, data.clip_set, "data.train")
    train: LabelledImages
    train, test = (_files(rows, split.class_names, data.image_size) for rows in (split.train, split.test))
    base, new = base_and_new(len(split.class_names))
    for name, part in (("base", base), ("new", new)):
        if not np.isin(test.labels, part).any():
            raise InputError(f"data.clip_set={data.clip_set}: no test image is of a {name} class; copy the split again")
    if data.labels == "base":
        train = train.at(np.flatnonzero(np.isin(train.labels, base)))
        train = take_at_most(train, data.num_per_class, seed=0) if data.num_per_class else train
    if not len(train):
        raise InputError(f"data.clip_set={data.clip_set}: there is no image to train on; copy the split again")
    return train, np.full(len(train), data.labels == "base"), None, test


def _files(rows: Sequence[tuple[str, int]], classes: tuple[str, ...], size: int) -> ImageFiles:
    paths, labels = np.empty(len(rows), dtype=object), np.array([label for _, label in rows], dtype=np.int64)
    paths[:] = [path for path, _ in rows]
    return ImageFiles(paths, labels, classes, size=size)


def _check_batches(recipe: config.ImageRecipe, num_images: int) -> None:
    options = recipe.training
    if options.drop_last and num_images < options.batch_size:
        raise InputError(
            f"training.batch_size={options.batch_size}: the {num_images} training images make no full batch, and "
            "training.drop_last=true leaves out others; lower it"
        )
    last = 0 if options.drop_last else num_images % options.batch_size
    if isinstance(recipe.student, CLIPStudent) and recipe.teacher and 1 in (last, options.batch_size):
        raise InputError(
            f"training.batch_size={options.batch_size}: {num_images} images leave a batch of 1, whose projection has "
            "no batch statistics; set another, or training.drop_last=true"
        )


def classifier_arguments(section: ImageModel, field: str) -> dict[str, Any]:
    """The section as arguments of `load_classifier`, for which it is looked at without loading it."""
    given = {
        key: value for key, value in section.model_dump(exclude={"remember"}).items() if value not in ("", 0, None)
    }
    said = find_classifier(kind=section.kind, name=given.get("name"), path=given.get("path"), section=field)
    if section.kind == "cifar" and "mean" not in said:
        given = {"mean": CIFAR_100_MEAN, "std": CIFAR_100_STD} | given
    return given | {"section": field}


def images_of(recipe: config.ImageRecipe, inputs: ImageInputs) -> dict[str, Any]:
    """What a cached teacher's logits are of: the images themselves, and what happens to those that are trained on."""
    augmentation = recipe.data.augmentation.model_dump(mode="json", exclude={"repeat_every"})
    parts = {"train": inputs.train, "validation": inputs.validation, "test": inputs.test}
    described = {name: _digest(images) for name, images in parts.items() if images is not None}
    return {"classes": list(inputs.train.classes), "augmentation": augmentation, **described}


def _digest(images: LabelledImages) -> dict[str, Any]:
    """Of the pixels; of files that are decoded later, of their names and lengths."""
    digest = hashlib.sha256()
    if isinstance(images, ImageFiles):
        for path in images.images:
            digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size} {images.size};".encode())
    else:
        digest.update(str(images.images.shape).encode())
        digest.update(np.ascontiguousarray(images.images).data)
    return {"num_images": len(images), "origin_digest": digest.hexdigest()[:16]}


def _check_cache(section: CachedClassifier) -> str:
    folder = find_path(section.path, "teacher.path")
    manifest = Manifest.read_whole(folder, "teacher.path", "image_classification")
    return f"teacher: {manifest.described}, {manifest.num_examples:,} images"


def _describe(section: ImageModel | CLIPSection | CachedClassifier, field: str) -> str:
    if isinstance(section, CachedClassifier):
        return _check_cache(section)
    if isinstance(section, CLIPStudent | CLIPTeacher):
        found = find_model(section.path, f"{field}.path")
        if section.prompts and not find_path(section.prompts, f"{field}.prompts").exists():
            raise InputError(f"{field}.prompts: there is no {section.prompts!r}; give a run's folder student")
        prompts = section.prompts or ("zero-shot" if field == "teacher" else "new prompts")
        return f"{field}: clip, {section.path} ({found if found else 'from the model hub'}), {prompts}"
    assert not isinstance(section, CLIPSection)
    given = classifier_arguments(section, field)
    source = given.get("path") or ("timm's own weights" if given.get("pretrained") else "random weights")
    return f"{field}: {given.get('name', given['kind'])}, {source}"
