"""Images that do not fit into memory: files that are read when a batch asks for them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from abkd.data.decoding import Unreadable, fitted, read_rgb, read_size
from abkd.data.image_files import list_images
from abkd.data.images import Augmentation, Draws, Images, augmented, random_boxes
from abkd.errors import InputError


class FolderStore(Images):
    """Batches as `ImageStore` gives them, of files that are decoded by threads while the batch waits.

    An image becomes `size` x `size` as `abkd.data.decoding.fitted` makes it, and is then padded, cropped and flipped;
    with `Augmentation.scale` the crop is taken out of the whole image, before it is made smaller.

    Args:
        labels: int64 `[N]`, of the files, indices into `classes`.
        size: pixels.
        num_threads: that decode side by side, at least 1.

    Raises:
        InputError: by `batch`, an image cannot be read.
    """

    def __init__(
        self, files: Sequence[Path], labels: np.ndarray, classes: tuple[str, ...], *, size: int, num_threads: int = 4
    ):
        self.files, self.size, self.num_threads = list(files), size, num_threads
        self.labels, self.classes = torch.from_numpy(labels), classes
        self.device = torch.device("cpu")

    @classmethod
    def read(cls, path: str, field: str, *, split: str, size: int, num_threads: int = 4) -> "FolderStore":
        """The files of a folder, as `abkd.data.image_files.list_images` finds them."""
        return cls(*list_images(path, field, split=split), size=size, num_threads=num_threads)

    def to(self, device: torch.device | str) -> "FolderStore":
        """Batches are made on this device from now on, after the files are decoded on the CPU."""
        self.device, self.labels = torch.device(device), self.labels.to(device)
        return self

    def batch(self, keys: Tensor, augmentation: Augmentation | None = None) -> Tensor:
        keys = keys.cpu()
        files = [self.files[index] for index in (keys % len(self)).tolist()]
        draws = Draws(0 if augmentation is None else augmentation.seed, keys, len(self))
        with ThreadPoolExecutor(self.num_threads) as pool:  # of this call: one kept would not survive a fork
            boxes: Sequence[Sequence[int] | None] = [None] * len(files)
            if augmentation is not None and augmentation.scale is not None:
                sizes = list(pool.map(lambda file: _or_refuse(read_size, file), files))
                boxes = random_boxes(draws, torch.tensor(sizes).mT, augmentation.scale).mT.tolist()
            arrays = list(pool.map(self._pixels, files, boxes))
        images = torch.from_numpy(np.stack(arrays)).to(self.device).permute(0, 3, 1, 2)
        if augmentation is None:
            return images / 255
        if augmentation.scale is not None:
            augmentation = replace(augmentation, scale=None, crop_padding=0)
        return augmented(images, Draws(augmentation.seed, keys.to(self.device), len(self)), augmentation)

    def _pixels(self, file: Path, box: Sequence[int] | None) -> np.ndarray:
        image, _ = _or_refuse(read_rgb, file)
        if box is None:
            return np.asarray(fitted(image, self.size))
        top, left, height, width = box
        cropped = image.crop((left, top, left + width, top + height))
        return np.asarray(cropped.resize((self.size, self.size), Image.Resampling.BICUBIC))


def _or_refuse(read: Callable[[Path], Any], file: Path) -> Any:
    try:
        return read(file)
    except Unreadable as error:
        raise InputError(f"{file} cannot be read ({error}); mend it, or take it out of the folder") from None
