"""A frozen image classifier in the same process as the student, and what every such teacher does."""

import abc

import torch
from torch import Tensor, nn


class AbstractClassifierTeacher(abc.ABC):
    """Gives logits of a batch of images; never trains, never keeps a graph."""

    model: nn.Module | None = None
    """Where it is a model in this process: it can be measured, and its layers looked at."""

    @abc.abstractmethod
    def logits(self, images: Tensor, keys: Tensor) -> Tensor:
        """`[batch, classes]` of the images of these keys, int64 `[batch]`."""


class ClassifierTeacher(AbstractClassifierTeacher):
    """A model that looks at each batch.

    Args:
        model: images `[batch, 3, height, width]` in 0 to 1 -> logits `[batch, classes]`. It is frozen and put in
            evaluation mode, in place.
        remember: keep the logits of every key in main memory, `classes` numbers each: for several students on one
            data set and one augmentation, whose keys then stand for the same images (`abkd.data.images`).
    """

    model: nn.Module

    def __init__(self, model: nn.Module, *, remember: bool = False):
        self.model = model.eval().requires_grad_(False)
        self.remember = remember
        self._logits: dict[int, Tensor] = {}  # key -> [classes]

    @torch.no_grad()
    def logits(self, images: Tensor, keys: Tensor) -> Tensor:
        if not self.remember:
            return self.model(images)
        wanted = keys.tolist()
        if not all(key in self._logits for key in wanted):
            self._logits.update(zip(wanted, self.model(images).float().cpu(), strict=True))
        return torch.stack([self._logits[key] for key in wanted]).to(images.device)
