"""What an image classifier's recipe names, found, read and checked before torch is imported."""

from typing import Any, NamedTuple

import numpy as np

from abkd import config
from abkd.config.images import CIFAR_100_MEAN, CIFAR_100_STD, ImageModel
from abkd.data.image_files import read_images
from abkd.data.labelled_images import LabelledImages, check_same_classes, keep_labels, split_off, take_per_class
from abkd.models.classifiers import find_classifier


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
    """Reads every image, and looks at what there is of every model.

    Raises:
        InputError: something is missing, malformed or does not go together.
    """
    sections = {"teacher": recipe.teacher, "student": recipe.student}
    models = [_describe(section, field) for field, section in sections.items() if section is not None]
    data = recipe.data
    how: dict[str, Any] = {
        "subset": data.subset,
        "image_column": data.image_column,
        "label_column": data.label_column,
        "size": data.image_size or None,
        "on_corrupt": data.on_corrupt,
    }
    train = read_images(data.train, "data.train", split=data.split, **how)
    test = read_images(data.test or data.train, "data.test", split=data.test_split, **how)
    check_same_classes(train, test, "data.test")
    validation = None
    if data.num_validation:
        train, validation = split_off(train, data.num_validation, "data.num_validation")
    if data.num_per_class:
        train = take_per_class(train, data.num_per_class, seed=0)
    is_labelled = np.ones(len(train), dtype=bool)
    if data.num_labelled_per_class:
        is_labelled = keep_labels(train, data.num_labelled_per_class, seed=0)
    return ImageInputs(train, is_labelled, validation, test, models)


def classifier_arguments(section: ImageModel, field: str) -> dict[str, Any]:
    """The section as arguments of `load_classifier`, for which it is looked at without loading it."""
    given = {
        key: value for key, value in section.model_dump(exclude={"remember"}).items() if value not in ("", 0, None)
    }
    said = find_classifier(kind=section.kind, name=given.get("name"), path=given.get("path"), section=field)
    if section.kind == "cifar" and "mean" not in said:
        given = {"mean": CIFAR_100_MEAN, "std": CIFAR_100_STD} | given
    return given | {"section": field}


def _describe(section: ImageModel, field: str) -> str:
    given = classifier_arguments(section, field)
    source = given.get("path") or ("timm's own weights" if given.get("pretrained") else "random weights")
    return f"{field}: {given.get('name', given['kind'])}, {source}"
