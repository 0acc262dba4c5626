"""Images for training, in memory, cropped and flipped at random by rules that a key alone decides.

A key is epoch * N + index, N the number of images. (seed, epoch, index) decides the crop and the flip, in whatever
batch, process or resumed run the key comes, so that what a teacher said of a key stays true of it.
"""

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from abkd.data.labelled_images import LabelledImages
from abkd.errors import InputError

ORDER, FLIP, TOP, LEFT, SHAPE = range(5)
"""Which of a key's random numbers decides what; those of crop shapes are SHAPE, SHAPE + 1, ..."""
ASPECT = 4 / 3
"""Of a random resized crop, width over height or the other way round, at most."""
ATTEMPTS = 10


@dataclass(frozen=True)
class Augmentation:
    """A random crop, then a mirror image half of the time.

    Args:
        crop_padding: pixels of black around the image, out of which a crop of its size is taken; 0 for none.
        flip: left to right, with probability 1/2.
        scale: (lowest, highest) share of the area, 0 < lowest <= highest <= 1: a crop of that share and of an aspect of
            3/4 to 4/3, resized to the image's size, takes the place of the padded one.
        seed: another one gives other crops and flips.
        repeat_every: epochs after which the crops and flips come again; 0 for never.

    Source: the padded crop as in He et al., "Deep residual learning", 2015, section 4.2; the resized one as in Szegedy
        et al., "Going deeper with convolutions", 2014, section 6.
    """

    crop_padding: int = 4
    flip: bool = True
    scale: tuple[float, float] | None = None
    seed: int = 0
    repeat_every: int = 0

    def __post_init__(self):
        if self.crop_padding < 0:
            raise InputError(f"crop_padding={self.crop_padding} must be 0 or more pixels")
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InputError(f"scale={self.scale} must be (lowest, highest) share of the area, within 0 to 1")
        if self.repeat_every < 0:
            raise InputError(f"repeat_every={self.repeat_every} must be 0 or more epochs")

    @property
    def period(self) -> int:
        """Epochs of different images; 0 where they never come again."""
        is_random = self.crop_padding > 0 or self.flip or self.scale is not None
        return self.repeat_every if is_random else 1


def repeated(keys: Tensor, augmentation: Augmentation | None, num_images: int) -> Tensor:
    """The first keys whose images are the same as those of `keys`."""
    period = 1 if augmentation is None else augmentation.period
    return keys % (period * num_images) if period else keys


class Draws:
    """Random numbers of keys: number n of a key is splitmix64 of (seed, epoch, index, n), on any device the same.

    Args:
        keys: int64 `[B]`.
        num_images: N, so that a key is epoch * N + index.
    """

    def __init__(self, seed: int, keys: Tensor, num_images: int):
        self._streams = splitmix64(splitmix64(torch.tensor(seed), keys // num_images), keys % num_images)

    def bits(self, number: Tensor | int) -> Tensor:
        """int64 `[B]`, all 64 bits random; of numbers `[n, 1]`, `[n, B]`, here and below."""
        return splitmix64(self._streams, torch.as_tensor(number))  # a number of no dimension may be on the CPU

    def below(self, number: Tensor | int, limit: Tensor | int) -> Tensor:
        """int64 `[B]`, uniform in 0 ... limit - 1; limit up to 2^31."""
        return _shifted(self.bits(number), 33) * limit >> 31

    def uniform(self, number: Tensor | int) -> Tensor:
        """float64 `[B]`, uniform in [0, 1)."""
        return _shifted(self.bits(number), 11).double() * 2.0**-53


def splitmix64(stream: Tensor, number: Tensor) -> Tensor:
    """Output `number`, from 0, of the generator splitmix64 that starts at `stream`; one is int64, modulo 2^64.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, with the constants of
        Vigna's splitmix64.
    """
    state = stream + (number + 1) * _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shifted(state, 31)


class Images(abc.ABC):
    """Labelled images that come in batches by key."""

    labels: Tensor
    """int64 `[N]`."""
    classes: tuple[str, ...]
    part = ""
    """Which of a recipe's images they are: train, validation or test."""

    @abc.abstractmethod
    def batch(self, keys: Tensor, augmentation: Augmentation | None = None) -> Tensor:
        """float32 `[B, 3, H, W]`, 0 to 1, of int64 keys `[B]`; not normalised: that is the models' part."""

    @abc.abstractmethod
    def to(self, device: torch.device | str) -> "Images":
        """Moves what batches are made of, in place."""

    def labels_of(self, keys: Tensor) -> Tensor:
        """int64 `[B]`."""
        return self.labels[keys.to(self.labels.device) % len(self)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int) -> int:
        """The key: what a DataLoader collects, for `batch` to make images of all at once."""
        return key


class ImageStore(Images):
    """All images as one uint8 tensor `[N, 3, H, W]`, on one device; batches are made there."""

    def __init__(self, images: LabelledImages):
        self.images = torch.from_numpy(images.images).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.from_numpy(images.labels)
        self.classes = images.classes

    def to(self, device: torch.device | str) -> "ImageStore":
        """Moves the images and labels, in place."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        return self

    def batch(self, keys: Tensor, augmentation: Augmentation | None = None) -> Tensor:
        keys = keys.to(self.images.device)
        images = self.images[keys % len(self)]
        if augmentation is None:
            return images / 255
        return augmented(images, Draws(augmentation.seed, keys, len(self)), augmentation)


class EpochSampler(torch.utils.data.Sampler[int]):
    """The keys of an epoch in random order: another one each epoch, the same for a seed.

    Args:
        num_images: N, above 0.
    """

    def __init__(self, num_images: int, seed: int):
        self.num_images, self.seed = num_images, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, also after a resume."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        keys = self.epoch * self.num_images + torch.arange(self.num_images)
        order = Draws(self.seed, keys, self.num_images).bits(ORDER).argsort(stable=True)
        return iter(keys[order].tolist())

    def __len__(self) -> int:
        return self.num_images


def augmented(images: Tensor, draws: Draws, augmentation: Augmentation) -> Tensor:
    """float32 `[B, 3, H, W]`, 0 to 1, of uint8 of that shape."""
    if augmentation.scale is not None:
        whole = torch.tensor(images.shape[2:], device=images.device)[:, None]
        images = resized_crops(images / 255, random_boxes(draws, whole, augmentation.scale))
    elif augmentation.crop_padding:
        images = padded_crops(images, draws, augmentation.crop_padding)
    if augmentation.flip:
        is_flipped = draws.below(FLIP, 2).bool()
        images = torch.where(is_flipped[:, None, None, None], images.flip(-1), images)
    return images if images.is_floating_point() else images / 255


def padded_crops(images: Tensor, draws: Draws, padding: int) -> Tensor:
    """One of the (2 * padding + 1)^2 windows `[H, W]` of each padded image `[B, C, H, W]`."""
    height, width = images.shape[2:]
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # [B, C, tops, lefts, H, W], a view
    top, left = (draws.below(number, 2 * padding + 1) for number in (TOP, LEFT))
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def random_boxes(draws: Draws, whole: Tensor, scale: tuple[float, float]) -> Tensor:
    """int64 `[4, B]`, (top, left, height, width) of crops of a random share of the area and a random aspect.

    The first of 10 draws that fits into the image; where none does, the largest crop in the middle whose aspect is
    within 3/4 to 4/3.

    Args:
        whole: int64 `[2, B]` or `[2, 1]`, heights and widths of the images.
    """
    numbers = torch.arange(SHAPE, SHAPE + 2 * ATTEMPTS, 2, device=whole.device)[:, None]
    area = whole.prod(0) * (scale[0] + (scale[1] - scale[0]) * draws.uniform(numbers))  # [attempts, B]
    aspect = torch.exp(math.log(ASPECT) * (2 * draws.uniform(numbers + 1) - 1))
    sides = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()]).round().long()  # [2, attempts, B]
    fits = ((sides > 0) & (sides <= whole.unsqueeze(1))).all(0)
    first = fits.int().argmax(0).expand(2, 1, -1)
    widest = (whole.flip(0) * ASPECT).round().long().minimum(whole)
    size = torch.where(fits.any(0), sides.gather(1, first).squeeze(1), widest)
    room = whole - size
    start = torch.stack([draws.below(TOP, room[0] + 1), draws.below(LEFT, room[1] + 1)])
    return torch.cat([torch.where(fits.any(0), start, room // 2), size])


def resized_crops(images: Tensor, boxes: Tensor) -> Tensor:
    """rows @ image @ columns^T: the boxes `[4, B]` of float images `[B, C, H, W]`, bicubic, at the images' size."""
    top, left, height, width = boxes
    rows = _interpolation(top, height, images.shape[2])
    columns = _interpolation(left, width, images.shape[3])
    return (rows.unsqueeze(1) @ images @ columns.unsqueeze(1).mT).clamp(0, 1)  # the kernel overshoots at edges


def _interpolation(start: Tensor, extent: Tensor, size: int) -> Tensor:
    """float32 `[B, size, size]`: how much of each pixel, of those from `start` on, is in each of `size` outputs.

    Source: Keys, "Cubic convolution interpolation for digital image processing", 1981, a = -1/2; as Pillow resizes.
    """
    start, extent = start[:, None], extent[:, None]
    pixel = torch.arange(size, device=start.device)
    centre = start + (pixel + 0.5) * extent / size - 0.5  # [B, size]
    distance = (centre.unsqueeze(2) - pixel).abs()
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weight = weight * ((pixel >= start) & (pixel < start + extent)).unsqueeze(1)
    return weight / weight.sum(2, keepdim=True)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """To the right, as unsigned."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits
