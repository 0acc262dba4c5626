"""Which differences are more than the spread over seeds. Numbers in, numbers out; standard library only."""

import math
from collections.abc import Sequence
from statistics import fmean, variance
from typing import NamedTuple

LEVEL = 0.95


class Spread(NamedTuple):
    """Of repeated measures of several points, each around its own mean."""

    sd: float
    """Pooled over the points: sqrt(sum of squared deviations / dof)."""
    dof: int
    """Sum over the points of their number of measures less 1."""

    @property
    def t(self) -> float:
        return t_quantile(self.dof)

    def half_width(self, num: int, num_other: int | None = None) -> float:
        """t * sd * sqrt(1/num), of the 95 % interval of a mean; of a difference of two, t * sd * sqrt(1/num + 1/other).

        Args:
            num, num_other: how many measures each mean is of.
        """
        return self.t * self.sd * math.sqrt(1 / num + (1 / num_other if num_other else 0))

    def differ(self, values: Sequence[float], others: Sequence[float]) -> bool:
        """|mean - mean| > t * sd * sqrt(1/n + 1/m): Student's two-sided test at 5 % with the pooled variance."""
        return abs(fmean(values) - fmean(others)) > self.half_width(len(values), len(others))


def pooled(groups: Sequence[Sequence[float]]) -> Spread | None:
    """The spread of the measures within each group; None where no group has two."""
    repeated = [group for group in groups if len(group) > 1]
    dof = sum(len(group) - 1 for group in repeated)
    if dof == 0:
        return None
    squares = sum(variance(group) * (len(group) - 1) for group in repeated)
    return Spread(math.sqrt(squares / dof), dof)


def t_quantile(dof: int, level: float = LEVEL) -> float:
    """t with P(|T| <= t) = level for Student's T of `dof` degrees of freedom, to 1e-9 relative.

    Args:
        dof: at least 1.
    """
    low, high = 0.0, 1.0
    while _within(high, dof) < level:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, dof) < level else (low, middle)
    return high


def _within(t: float, dof: int) -> float:
    """P(|T| <= t), a finite sum. Source: Abramowitz and Stegun, 1964, 26.7.3 (odd dof) and 26.7.4 (even)."""
    angle = math.atan(t / math.sqrt(dof))
    is_odd = dof % 2
    term = math.cos(angle) if is_odd else 1.0
    total = term if dof > 1 else 0.0
    for index in range(2 + is_odd, dof - 1, 2):
        term *= math.cos(angle) ** 2 * (index - 1) / index
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if is_odd else total
