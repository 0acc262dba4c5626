"""What runs and trials say together: a surface over (alpha, beta), sweeps of one exponent, curves. Rows in, panels out.

A row is a mapping with "alpha", "beta" and measures by the names of `MEASURES`; a measure that is missing or None is
passed over. Rows of the same (alpha, beta) are repeats.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from abkd.analysis.panels import Curve, Curves, Point, Surface
from abkd.errors import InputError

Row = Mapping[str, Any]


class Measure(NamedTuple):
    title: str
    unit: str
    better: Literal["lower", "higher", ""] = ""


MEASURES = {
    "forward_kl": Measure("forward KL", "nats", "lower"),
    "reverse_kl": Measure("reverse KL", "nats", "lower"),
    "alpha_beta": Measure("α-β (0.2, 0.7)", "nats", "lower"),
    "next_token_loss": Measure("next-token loss", "nats", "lower"),
    "cross_entropy": Measure("cross-entropy", "nats", "lower"),
    "token_agreement": Measure("token agreement", "share of tokens", "higher"),
    "agreement": Measure("agreement", "share of images", "higher"),
    "rouge_l": Measure("ROUGE-L", "0 to 100", "higher"),
    "sets_mean": Measure("mean over evaluation sets", "0 to 100", "higher"),
    "top1": Measure("top-1 accuracy", "share of images", "higher"),
    "entropy": Measure("entropy of the student", "nats"),
    "self_bleu": Measure("Self-BLEU", "0 to 100"),
}
"""Keys of results.json and of the log -> how they are named; of a study's rows too."""


class Run(NamedTuple):
    """A finished or running training, as its folder tells it."""

    name: str
    alpha: float | None
    beta: float | None
    """Its point of the plane: (1, 0) for the forward KL, (0, 1) for the reverse one; None off the plane."""
    metrics: Sequence[Mapping[str, Any]] = ()
    """The lines of metrics.jsonl."""
    results: Mapping[str, Any] | None = None
    """The content of results.json."""

    @property
    def row(self) -> dict[str, Any] | None:
        """The point with the measures of the student after the training; None without either."""
        if self.alpha is None or self.beta is None or self.results is None:
            return None
        after = self.results["after"]
        bleus = [each["self_bleu"] for each in after.get("sets", {}).values() if each.get("self_bleu") is not None]
        row = {"alpha": self.alpha, "beta": self.beta} | {key: after[key] for key in MEASURES if key in after}
        return row | ({"self_bleu": fmean(bleus)} if bleus else {})


def surface(rows: Sequence[Row], measure: str) -> Surface | None:
    """The mean at each (alpha, beta), and where it is best; None where fewer than three points have the measure."""
    chosen = _measure(measure)
    points = tuple(
        Point(alpha, beta, fmean(xs), len(xs)) for (alpha, beta), xs in sorted(_by_point(rows, measure).items())
    )
    if len(points) < 3:
        return None
    choose = {"lower": min, "higher": max}.get(chosen.better)
    best = choose(points, key=lambda point: point.value) if choose else None
    direction = f", {chosen.better} is better" if chosen.better else ""
    return Surface(chosen.title, f"{chosen.unit}{direction}", points, best)


def sensitivity(rows: Sequence[Row], along: Literal["alpha", "beta"], measure: str) -> Curves | None:
    """The measure over one exponent, a curve for each value of the other one that has two points or more; else None.

    The spread is the standard deviation over the repeats of a point.
    """
    chosen = _measure(measure)
    curves: dict[float, list[tuple[float, list[float]]]] = defaultdict(list)
    for (alpha, beta), values in sorted(_by_point(rows, measure).items()):
        x, other = (alpha, beta) if along == "alpha" else (beta, alpha)
        curves[other].append((x, values))
    letter, other_letter = ("α", "β") if along == "alpha" else ("β", "α")
    drawn = []
    for other, points in sorted(curves.items()):
        if len(points) > 1:
            means = tuple(fmean(values) for _, values in points)
            spread = tuple(stdev(values) if len(values) > 1 else 0.0 for _, values in points)
            drawn.append(Curve(f"{other_letter} = {other:g}", tuple(x for x, _ in points), means, spread))
    return Curves(f"{chosen.title} over {letter}", letter, chosen.unit, tuple(drawn)) if drawn else None


def validation_curves(runs: Sequence[Run], measure: str) -> Curves | None:
    """A validation measure over the optimiser steps, a curve for each run that logged it; None without one.

    The student before and after the training, where results.json has them, are points of the curve too.
    """
    chosen, key, drawn = _measure(measure), f"validation_{measure}", []
    for run in runs:
        points = {line["step"]: line[key] for line in run.metrics if key in line}
        if not points:
            continue
        if run.results is not None:
            for when, step in (("before", 0), ("after", run.results["student_step"])):
                if measure in run.results[when]:
                    points[step] = run.results[when][measure]
        xs, ys = zip(*sorted(points.items()), strict=True)
        drawn.append(Curve(run.name, xs, ys))
    return Curves(f"{chosen.title} on validation", "optimiser step", chosen.unit, tuple(drawn)) if drawn else None


def _measure(name: str) -> Measure:
    if name not in MEASURES:
        raise InputError(f"measure must be one of {', '.join(MEASURES)}, got {name!r}")
    return MEASURES[name]


def _by_point(rows: Sequence[Row], measure: str) -> dict[tuple[float, float], list[float]]:
    """(alpha, beta) -> the values of its repeats."""
    values = defaultdict(list)
    for row in rows:
        if row.get(measure) is not None:
            values[float(row["alpha"]), float(row["beta"])].append(float(row[measure]))
    return values
