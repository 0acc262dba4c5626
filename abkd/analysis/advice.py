"""A starting point for (alpha, beta) out of rows of teacher and student before any training. A heuristic, said so.

p is the teacher, q the student. The rule is the two settings that the paper settled on, with a line between them in the
logarithm of the number of classes: (0.8, 0.3) for CIFAR-100's 100 classes, (0.2, 0.7) for GPT-2's 50,257 tokens.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abkd.analysis.movement import MassMeter, MassStep
from abkd.divergences import AlphaBeta

FEW, MANY = (100, (0.8, 0.3)), (50_257, (0.2, 0.7))
"""Number of classes -> the paper's (alpha, beta): Table 4's resnet56 -> resnet20, Table 7."""
FAR_APART = 0.3
"""An overlap of teacher and student below this makes alpha smaller by 0.1."""
GRID = (*((alpha, beta) for alpha in (0.2, 0.5, 0.8) for beta in (0.2, 0.5, 0.8)), (1.0, 0.0), (0.0, 1.0))
ROWS_TO_STEP = 8
"""Of each call, for the steps of `GRID`."""


class Overview(NamedTuple):
    """Means over the rows, at temperature 1; entropies and divergences in nats."""

    num_rows: int
    num_classes: int
    teacher_entropy: float
    student_entropy: float
    outside_top: float
    """1 - max p: the teacher's mass on all classes but its first."""
    overlap: float
    """sum min(p, q): 1 where both are equal, 0 where they share no class."""
    agreement: float
    """Share of rows with one most probable class."""
    steps: Mapping[tuple[float, float], MassStep]
    """(alpha, beta) -> where one step under it would move the student's mass."""


class Advice(NamedTuple):
    alpha: float
    beta: float
    neighbours: tuple[tuple[float, float], ...]
    """To try next."""
    reasons: tuple[str, ...]


class OverviewMeter:
    """Gathers an `Overview`: call it with log-probabilities `[N, classes]` of student and teacher."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._num_rows = self._num_classes = 0
        self._steps = {(alpha, beta): MassMeter(AlphaBeta(alpha, beta)) for alpha, beta in GRID}

    @torch.no_grad()
    def __call__(self, student: Tensor, teacher: Tensor) -> None:
        if not len(student):
            return
        self._num_rows, self._num_classes = self._num_rows + len(student), student.shape[-1]
        q, p = student.exp(), teacher.exp()
        found = {
            "teacher_entropy": torch.special.entr(p).sum(),
            "student_entropy": torch.special.entr(q).sum(),
            "outside_top": (1 - p.amax(-1)).sum(),
            "overlap": torch.minimum(p, q).sum(),
            "agreement": (p.argmax(-1) == q.argmax(-1)).sum(),
        }
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.item()
        for meter in self._steps.values():
            meter(student[:ROWS_TO_STEP], teacher[:ROWS_TO_STEP])

    def result(self) -> Overview:
        """At least one row must have been there."""
        means: dict[str, Any] = {name: value / self._num_rows for name, value in self._sums.items()}
        steps = {point: meter.result() for point, meter in self._steps.items()}
        return Overview(self._num_rows, self._num_classes, **means, steps=steps)


def advise(overview: Overview) -> Advice:
    """The proposal, its neighbours on the same alpha + beta, and why."""
    (few, low), (many, high) = FEW, MANY
    share = min(1.0, max(0.0, math.log(overview.num_classes / few) / math.log(many / few)))
    alpha, beta = (a + share * (b - a) for a, b in zip(low, high, strict=True))
    reasons = [
        f"{overview.num_classes:,} classes: between the paper's (0.8, 0.3) for 100 and (0.2, 0.7) for 50,257, "
        f"{100 * share:.0f} % of the way in the logarithm"
    ]
    if overview.overlap < FAR_APART:
        alpha = max(0.1, alpha - 0.1)
        reasons.append(
            f"teacher and student share {overview.overlap:.2f} of their mass, less than {FAR_APART}: alpha smaller by "
            "0.1, which chases large errors harder"
        )
    alpha, beta = round(alpha, 1), round(beta, 1)
    moved = ((round(alpha + by, 1), round(beta - by, 1)) for by in (-0.2, 0.2))
    neighbours = tuple((a, b) for a, b in moved if a >= 0 and b >= 0)
    return Advice(alpha, beta, neighbours, tuple(reasons))
