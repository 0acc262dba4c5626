"""Accuracy on base classes, which a teacher was trained on, and on new ones, each among its own classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from abkd.divergences import Divergence
from abkd.evaluation.classification import ClassificationMeter, harmonic_mean


class BaseToNewMeter(ClassificationMeter):
    """A `ClassificationMeter` whose result says the two accuracies and their harmonic mean as well.

    Args:
        base, new: the labels of each.
        divergences, temperature: as of `ClassificationMeter`.
    """

    def __init__(
        self,
        base: range,
        new: range,
        divergences: Mapping[str, Divergence] | None = None,
        *,
        temperature: float = 4.0,
    ):
        super().__init__(divergences, temperature=temperature)
        self.parts = {"base": base, "new": new}

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> None:
        super().add(logits, labels, teacher_logits)
        labels = labels.to(logits.device)
        for name, part in self.parts.items():
            is_in = (labels >= part.start) & (labels < part.stop)
            best = logits[:, part.start : part.stop].argmax(dim=-1) + part.start
            for key, each in ((f"{name}_images", is_in), (f"{name}_right", is_in & (best == labels))):
                self._sums[key] = self._sums.get(key, 0) + each.sum().cpu().double()

    def result(self, classes: Sequence[str] | None = None) -> dict[str, Any]:
        """`ClassificationMeter.result`, and `base_accuracy`, `new_accuracy` (None without images) and `harmonic_mean`.

        Shares from 0 to 1: of the images of base classes whose largest logit among base classes is their label's;
        likewise of the new ones. `top1` is among all classes.
        """
        result = super().result(classes)
        for name in self.parts:
            images, right = result.pop(f"{name}_images"), result.pop(f"{name}_right")
            result[f"{name}_accuracy"] = right / images if images else None
        base, new = result["base_accuracy"], result["new_accuracy"]
        result["harmonic_mean"] = None if base is None or new is None else harmonic_mean(base, new)
        return result
