"""What a figure shows, as plain numbers: panels. `plots` draws them, and computes nothing."""

from collections.abc import Mapping
from typing import NamedTuple

from abkd.analysis.mass import RankMass
from abkd.analysis.movement import MassStep


class Curve(NamedTuple):
    label: str
    """A label that begins with a name of `plots.STYLES` has its colour, marker and line in every figure."""
    x: tuple[float, ...]
    y: tuple[float, ...]
    spread: tuple[float, ...] | None = None
    """Standard deviation of each y, drawn as bars; 0 where there is one value alone."""


class Curves(NamedTuple):
    """A panel of curves; labels of axes say the unit."""

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    behind: Curve | None = None
    """Drawn as grey steps behind the curves."""
    log_x: bool = False
    log_y: bool = False
    y_range: tuple[float, float] | None = None


class Bars(NamedTuple):
    """A panel of bars side by side in each bucket."""

    title: str
    x_label: str
    y_label: str
    labels: tuple[str, ...]
    """One a bucket."""
    bars: Mapping[str, tuple[float, ...]]
    """Name -> one number a bucket."""


class Point(NamedTuple):
    """A point of the (alpha, beta) plane where something was measured."""

    alpha: float
    beta: float
    value: float
    """The mean over the repeats."""
    num_repeats: int


class Surface(NamedTuple):
    """A panel of the (alpha, beta) plane, coloured by a measure."""

    title: str
    value_label: str
    points: tuple[Point, ...]
    best: Point | None
    """None for a measure that is neither better when low nor when high."""


class Plane(NamedTuple):
    """A panel of the (alpha, beta) plane with the named divergences, and runs."""

    runs: tuple[tuple[str, float, float], ...] = ()
    """(name, alpha, beta)."""


Panel = Curves | Bars | Surface | Plane


def rank_mass_bars(masses: Mapping[str, RankMass]) -> Bars:
    """The mass of several students by the teacher's rank, beside the teacher's own, which is that of the first."""
    first = next(iter(masses.values()))
    bars = {"teacher": first.teacher} | {name: mass.student for name, mass in masses.items()}
    return Bars("probability mass by teacher rank", "rank of the token to the teacher", "mean mass", first.labels, bars)


def mass_step_bars(steps: Mapping[str, MassStep]) -> tuple[Bars, ...]:
    """Where steps move the mass, in shares of what each moves, and where their gradients lie.

    Args:
        steps: name -> `mass_step` of the same rows under one divergence each; each moves something.
    """
    panels = []
    for kind, x_label in (("by_rank", "rank of the class to the teacher"), ("by_error", "ln p − ln q, nats")):
        buckets = {name: getattr(step, kind) for name, step in steps.items()}
        labels = next(iter(buckets.values())).labels
        moved = {name: tuple(x / steps[name].moved for x in each.moved) for name, each in buckets.items()}
        shares = {name: each.gradient_share for name, each in buckets.items() if each.gradient_share is not None}
        panels.append(Bars("where a step moves the mass", x_label, "mass gained / mass moved", labels, moved))
        panels.append(Bars("where the gradient lies", x_label, "share of Σ |∂D/∂z|", labels, shares))
    return tuple(panels)
