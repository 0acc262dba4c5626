"""Several teachers as one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abkd.errors import InputError
from abkd.targets.top_k import TopKTargets


@dataclass(frozen=True, eq=False)
class MixtureTargets:
    """p = sum_i weights[i] * p_i, p_i the distribution of parts[i] at temperature 1; a constant, without a gradient.

    A temperature asked for later divides ln p, as it divides the logits of one teacher.

    Args:
        parts: targets of the same tokens and the same vocabulary. Of top-k targets rows are made, so their tail is
            "uniform" or "renormalise" and their temperature 1.
        weights: > 0, one for each; they are made to add up to 1.

    Raises:
        InputError: what does not fit.
    """

    parts: Sequence[Any]
    weights: Sequence[float]

    def __post_init__(self):
        if len(self.parts) != len(self.weights) or not self.parts:
            raise InputError(f"weights must be one for each of {len(self.parts)} parts, got {len(self.weights)}")
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise InputError(f"weights must be above 0, got {list(self.weights)}")
        shapes = [part.shape for part in self.parts]
        if len(set(shapes)) > 1:
            raise InputError(f"parts of a mixture must be of one shape (N, vocab), got {shapes}")
        for part in self.parts:
            if isinstance(part, TopKTargets) and (part.tail not in ("uniform", "renormalise") or part.temperature != 1):
                raise InputError(
                    f"top-k targets with tail={part.tail} at temperature {part.temperature:g} have no row to mix; use "
                    "tail=uniform or tail=renormalise at temperature 1"
                )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, vocab)."""
        return self.parts[0].shape

    @property
    def tensors(self) -> list[Tensor]:
        """Those that may ask for a gradient: none."""
        return []

    @torch.no_grad()
    def logits(self, start: int, stop: int) -> Tensor:
        """ln p, `[stop - start, vocab]` in fp32 at least."""
        total = sum(self.weights)
        rows: Tensor | None = None
        for part, weight in zip(self.parts, self.weights, strict=True):
            one = part.logits(start, stop).log_softmax(-1) + math.log(weight / total)
            rows = one if rows is None else torch.logaddexp(rows, one)
        assert rows is not None
        return rows
