"""An image classifier that wrote its logits down, of every augmented image: `abkd.teachers.cache`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from abkd.errors import InputError
from abkd.teachers.cache.manifest import first_difference
from abkd.teachers.cache.store import Store
from abkd.teachers.classifier import AbstractClassifierTeacher

PARTS = ("test", "validation")
"""Of images that are measured as they are, and never trained on."""


def plain_keys(part: str, index: Tensor) -> Tensor:
    """int64 keys of images as they are; those of augmented ones, epoch * N + index, are 0 or more."""
    return -1 - (index * len(PARTS) + PARTS.index(part))


def plain_image(keys: Tensor) -> tuple[str, Tensor]:
    """(part, index) of keys of one part that `plain_keys` gave."""
    number = -1 - keys
    return PARTS[int(number[0]) % len(PARTS)], number // len(PARTS)


class CachedClassifierTeacher(AbstractClassifierTeacher):
    """Gives the logits of a cache for the keys of training images, and for the test and validation images.

    Args:
        store: the cache.
        data: what the images are, as the manifest has it; any difference is refused.
        num_epochs: of different crops that will be asked for.
        field: what the recipe calls the folder, for messages.

    Raises:
        InputError: the cache is of other images, or of fewer epochs.
    """

    def __init__(self, store: Store, data: Mapping[str, Any], num_epochs: int, *, field: str = "teacher.path"):
        self.store = store
        made = {name: value for name, value in store.manifest.data.items() if name not in ("digest", "num_epochs")}
        if made != dict(data):
            name, here, there = first_difference(dict(data), made)
            raise InputError(
                f"{field}: the cache in {str(store.folder)!r} was made with {name}={there!r}, and here is "
                f"{name}={here!r}; use the cache's, or write another cache"
            )
        if (there := store.manifest.data["num_epochs"]) < num_epochs:
            raise InputError(
                f"{field}: the cache in {str(store.folder)!r} has the crops of {there} epochs, and the training has "
                f"{num_epochs}; write a cache of as many, or set data.augmentation.repeat_every={there}"
            )

    @torch.no_grad()
    def logits(self, images: Tensor, keys: Tensor) -> Tensor:
        return self._rows(keys, images.device)

    def plain_logits(self, part: str) -> Tensor:
        """`[N, classes]`, on the CPU, of the images of `part`, "test" or "validation"."""
        count = self.store.manifest.data[part]["num_images"]
        return self._rows(plain_keys(part, torch.arange(count)), torch.device("cpu"))

    def _rows(self, keys: Tensor, device: torch.device) -> Tensor:
        where = self.store.find(keys.tolist())
        if (where < 0).any():
            raise InputError(
                f"the cache in {str(self.store.folder)!r} lacks the image of key {int(keys[where < 0][0])}"
            )
        return self.store.single_rows(where).float().to(device)
