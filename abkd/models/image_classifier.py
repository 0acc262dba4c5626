"""A network together with the normalisation of its own images."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from abkd.errors import InputError
from abkd.models.classifier_spec import ClassifierSpec


class ImageClassifier(nn.Module):
    """logits = network((resize(pixel_values) - mean) / std).

    Student and teacher each carry their own mean, std and size, so that both see the same images in 0..1.

    Args:
        network: gives logits `[batch, num_classes]` or a transformers output that holds them.
        spec: what the images and the logits mean, and how the network is built again.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, spec: ClassifierSpec):
        super().__init__()
        self.network, self.spec = network, spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)

    @property
    def num_classes(self) -> int:
        return self.spec.num_classes

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.spec.classes

    @property
    def size(self) -> int | None:
        return self.spec.size

    def forward(self, pixel_values: Tensor) -> Tensor:
        """
        Args:
            pixel_values: `[batch, 3, height, width]`, floating point in 0..1, not normalised.

        Returns:
            Logits `[batch, num_classes]`.

        Raises:
            InputError: the images are whole numbers or have another shape.
        """
        output: Any = self.network(self.prepare(pixel_values))
        return output if isinstance(output, Tensor) else output.logits

    def prepare(self, pixel_values: Tensor) -> Tensor:
        """(resize(pixel_values) - mean) / std, what the network sees; bilinear and antialiased."""
        if not pixel_values.is_floating_point() or pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise InputError(
                f"pixel_values must be [batch, 3, height, width] in 0..1, got {pixel_values.dtype} "
                f"{list(pixel_values.shape)}; divide whole numbers by 255"
            )
        if self.size is not None and pixel_values.shape[2:] != (self.size, self.size):
            pixel_values = interpolate(pixel_values, size=(self.size, self.size), mode="bilinear", antialias=True)
        return ((pixel_values - self.mean) / self.std).to(self.mean.dtype)  # the network's, whatever the images'
