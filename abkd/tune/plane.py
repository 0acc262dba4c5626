"""The part of the (alpha, beta) plane that is searched: bounds, a line, grids. Standard library only."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from abkd.errors import InputError

PAPER_SUMS = (0.8, 0.9, 1.0, 1.1)
"""alpha + beta of the grid that the ABKD paper's scripts loop over; alpha runs from 0.1 to 1 in steps of 0.1."""
LINES = {"alpha": (1, 0), "beta": (0, 1), "alpha+beta": (1, 1), "alpha-beta": (1, -1)}
"""Left side of a line -> its weights of alpha and of beta."""
DIGITS = 6
"""Coordinates are rounded to so many decimals: 0.1 + 0.2 is 0.3, on a grid as in a recipe."""


class Range(NamedTuple):
    """low <= x <= high, and on a grid low, low + step, low + 2 step, ..."""

    low: float = 0.0
    high: float = 1.0
    step: float = 0.2

    @classmethod
    def parse(cls, text: str, option: str) -> "Range":
        """LOW:HIGH or LOW:HIGH:STEP."""
        try:
            numbers = [round(float(part), DIGITS) for part in text.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) not in (2, 3) or not all(map(math.isfinite, numbers)):
            raise InputError(f"{option}: {text!r} is refused: give LOW:HIGH or LOW:HIGH:STEP, as in 0:1:0.2")
        found = cls(*numbers)
        if not (found.low < found.high and found.step > 0):
            raise InputError(f"{option}: {text!r} is refused: LOW must be below HIGH, and STEP above 0")
        return found

    def values(self) -> list[float]:
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return [round(self.low + index * self.step, DIGITS) for index in range(count)]

    def holds(self, value: float) -> bool:
        return self.low - 1e-9 <= value <= self.high + 1e-9

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


UNIT = Range()
"""Outside of it results fall off, by the paper's Table 15."""


class Line(NamedTuple):
    """weights[0] * alpha + weights[1] * beta = value"""

    name: str
    value: float

    @classmethod
    def parse(cls, text: str) -> "Line":
        """LEFT=NUMBER, LEFT being one of `LINES`."""
        name, _, number = text.replace(" ", "").partition("=")
        try:
            value = round(float(number), DIGITS)
        except ValueError:
            value = math.nan
        if name not in LINES or not math.isfinite(value):
            forms = ", ".join(f"{each}=NUMBER" for each in LINES)
            raise InputError(f"--line: {text!r} is refused: give one of {forms}")
        return cls(name, value)

    def beta(self, alpha: float) -> float:
        """Of the line's point at this alpha; the line is none of constant alpha."""
        of_alpha, of_beta = LINES[self.name]
        return (self.value - of_alpha * alpha) / of_beta

    def alpha(self, beta: float) -> float:
        """Of the line's point at this beta; the line is none of constant beta."""
        of_alpha, of_beta = LINES[self.name]
        return (self.value - of_beta * beta) / of_alpha

    def holds(self, alpha: float, beta: float) -> bool:
        of_alpha, of_beta = LINES[self.name]
        return math.isclose(of_alpha * alpha + of_beta * beta, self.value, abs_tol=1e-6)

    def __str__(self) -> str:
        return f"{self.name}={self.value:g}"


@dataclass(frozen=True)
class Plane:
    """The points within two ranges, or those of a line within them.

    Raises:
        InputError: the line misses the ranges.
    """

    alpha: Range = UNIT
    beta: Range = UNIT
    line: Line | None = None

    def __post_init__(self) -> None:
        if any(range_.low > range_.high for range_ in self.free.values()):
            raise InputError(
                f"--line: {self.line} misses alpha {self.alpha} and beta {self.beta}; "
                "widen --alpha and --beta, or give another line"
            )

    @property
    def free(self) -> dict[str, Range]:
        """What a sampler draws: alpha and beta, or on a line the one that says where on it."""
        if self.line is None:
            return {"alpha": self.alpha, "beta": self.beta}
        of_alpha, of_beta = LINES[self.line.name]
        if of_beta == 0:
            is_inside = self.alpha.holds(self.line.value)
            return {"beta": self.beta if is_inside else Range(1, 0)}
        if of_alpha == 0:
            is_inside = self.beta.holds(self.line.value)
            return {"alpha": self.alpha if is_inside else Range(1, 0)}
        low, high = sorted((self.line.alpha(self.beta.low), self.line.alpha(self.beta.high)))
        low, high = max(low, self.alpha.low), min(high, self.alpha.high)
        return {"alpha": Range(round(low, DIGITS), round(high, DIGITS), self.alpha.step)}

    def point(self, drawn: Mapping[str, float]) -> tuple[float, float]:
        """(alpha, beta) of what was drawn for `free`."""
        if self.line is None:
            alpha, beta = drawn["alpha"], drawn["beta"]
        elif "alpha" in drawn:
            alpha, beta = drawn["alpha"], self.line.beta(drawn["alpha"])
        else:
            alpha, beta = self.line.alpha(drawn["beta"]), drawn["beta"]
        return round(alpha, DIGITS), round(beta, DIGITS)

    def drawn(self, alpha: float, beta: float) -> dict[str, float]:
        """What would have been drawn for a point of the plane."""
        return {name: {"alpha": alpha, "beta": beta}[name] for name in self.free}

    def holds(self, alpha: float, beta: float) -> bool:
        is_inside = self.alpha.holds(alpha) and self.beta.holds(beta)
        return is_inside and (self.line is None or self.line.holds(alpha, beta))

    def grid(self) -> list[tuple[float, float]]:
        """Every combination of the ranges' values, alpha first; on a line those of what is free."""
        (first, *others) = self.free.items()
        drawn = [{first[0]: value} for value in first[1].values()]
        for name, values in others:
            drawn = [each | {name: value} for each in drawn for value in values.values()]
        return [self.point(each) for each in drawn]

    def paper_grid(self) -> list[tuple[float, float]]:
        """Sum by sum, and for each sum alpha by alpha, as the paper's scripts; beta = sum - alpha >= 0.

        Of it the points within the ranges and on the line. Source: Wang et al., 2025, the training scripts' loops.

        Raises:
            InputError: there is none.
        """
        tenths = [(step / 10, round(total - step / 10, DIGITS)) for total in PAPER_SUMS for step in range(1, 11)]
        found = [point for point in tenths if point[1] >= 0 and self.holds(*point)]
        if not found:
            where = f"on {self.line}" if self.line else f"in alpha {self.alpha} and beta {self.beta}"
            raise InputError(f"--sampler: no point of the paper's grid is {where}; use --sampler grid")
        return found
