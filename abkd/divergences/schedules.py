"""alpha and beta that move during training, across the limit lines if need be: every point of the plane is ordinary."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from abkd import ranges
from abkd.divergences.kinds import AlphaBeta
from abkd.errors import InputError

Shape = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Ramp:
    """From `start` to `end` over the training; a constant one stays at `start`."""

    start: float
    end: float
    shape: Shape = "linear"

    def __post_init__(self):
        ranges.finite("start", self.start)
        ranges.finite("end", self.end)
        if self.shape not in get_args(Shape):
            raise InputError(f"shape must be one of {', '.join(get_args(Shape))}, got {self.shape!r}")

    def at(self, progress: float) -> float:
        """The value at `progress`, 0 at the first step, 1 at the last; exactly `start` and `end` there."""
        done = {"constant": 0.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}[self.shape]
        return (1 - done) * self.start + done * self.end


@dataclass(frozen=True)
class AlphaBetaSchedule:
    """`AlphaBeta` with an exponent that moves, or two."""

    alpha: float | Ramp = 0.2
    beta: float | Ramp = 0.7

    def __post_init__(self):
        self.at(0.0)

    def __call__(self, *, student: Tensor, teacher: Tensor) -> Tensor:
        raise InputError(f"{self} has no value before it is resolved; call .at(progress), as in objective.at(progress)")

    def at(self, progress: float) -> AlphaBeta:
        """The divergence at `progress`, 0 to 1, of the training."""
        return AlphaBeta(*(x.at(progress) if isinstance(x, Ramp) else x for x in (self.alpha, self.beta)))
