"""The cache of an image classifier's teacher: its logits of every augmented image of every epoch."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abkd import config
from abkd.caching.options import SHARD_ROWS, CacheOptions
from abkd.caching.writing import CacheWriter, Shard, write_cache
from abkd.engine import device_type
from abkd.image_inputs import ImageInputs, images_of
from abkd.parts import make_augmentation
from abkd.setup import Say
from abkd.tasks.images import ImageSetup, num_distinct_epochs, prepare
from abkd.teachers.cache.encoding import DenseEncoding
from abkd.teachers.cache.identity import weights_digest
from abkd.teachers.cache.manifest import Manifest, digest_of
from abkd.teachers.cached_classifier import plain_image, plain_keys


def cache_pictures(
    recipe: config.ImageRecipe, inputs: ImageInputs, options: CacheOptions, folder: Path, say: Say
) -> None:
    """Logits of the training images as each epoch crops them, and of the test and validation images as they are.

    Args:
        recipe, inputs, options: as `abkd.caching.check.check` passed them.
    """
    writer = _Writer(recipe, inputs, prepare(recipe, inputs, say), options)
    write_cache(folder, writer, say)


class _Writer(CacheWriter):
    """Shards of consecutive keys."""

    def __init__(self, recipe: config.ImageRecipe, inputs: ImageInputs, setup: ImageSetup, options: CacheOptions):
        assert setup.teacher is not None and setup.teacher.model is not None
        device = torch.device(device_type(recipe.training))
        self.model = setup.teacher.model.to(device)
        self.batch_size = options.batch_size or recipe.evaluation.batch_size
        self.train, self.plain = setup.train.to(device), [setup.test.to(device)]
        self.plain += [] if setup.validation is None else [setup.validation.to(device)]
        self.augmentation = make_augmentation(recipe.data.augmentation)
        num_epochs = num_distinct_epochs(recipe, len(setup.train))
        keys = [plain_keys(images.part, torch.arange(len(images))) for images in self.plain]
        keys += [torch.arange(num_epochs * len(setup.train))]
        self.parts = [part for each in keys for part in each.split(options.shard_tokens or SHARD_ROWS)]
        dtype = getattr(torch, options.dtype or "float32")
        self.encoding = DenseEncoding(len(setup.train.classes), dtype)
        data = images_of(recipe, inputs) | {"num_epochs": num_epochs}
        section = recipe.teacher
        assert section is not None
        self.manifest = Manifest(
            task=recipe.task,
            targets={"kind": "logits", "width": self.encoding.width, "dtype": str(dtype).removeprefix("torch.")},
            vocab=self.encoding.width,
            teacher={"identity": weights_digest(self.model), "section": section.model_dump(), "revision": None},
            tokenizer={},
            data=data | {"digest": digest_of(data)},
            shards=[[len(part), len(part)] for part in self.parts],
            version=version("abkd"),
        )

    @property
    def num_bytes(self) -> int:
        """Of the shards, at most: a row, its key and its place."""
        return self.encoding.most_bytes(self.manifest.num_tokens) + 16 * self.manifest.num_tokens

    @torch.no_grad()
    def make_shard(self, number: int, progress: Callable[[int], Any]) -> Shard:
        keys, encoded = self.parts[number], []
        for part in keys.split(self.batch_size):
            rows = self.encoding.encode(self.model(self._images(part)))["rows"]
            encoded += [{"rows": row} for row in rows.split(1)]
            progress(len(part))
        return keys.tolist(), encoded

    def _images(self, keys: Tensor) -> Tensor:
        """As they are trained on, or as they are."""
        if keys[0] >= 0:
            return self.train.batch(keys, self.augmentation)
        part, index = plain_image(keys)
        (images,) = [images for images in self.plain if images.part == part]
        return images.batch(index)
