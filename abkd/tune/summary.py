"""What the trials of a search say: the recommended point, what is not told apart from it, rows to draw. Torch-free."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from abkd.analysis.spread import Spread, pooled
from abkd.tune.options import Search
from abkd.tune.points import Point
from abkd.tune.study import Trial

NUM_SHOWN = 20
"""Points in the table of a terminal."""


@dataclass(frozen=True)
class Conclusion:
    """Every point that was trained in full counts: a finalist by its own seeds, any other by its one training."""

    values: dict[Point, list[float]]
    """The best mean first."""
    spread: Spread | None
    """Over seeds; None before a point has two."""
    best: Point
    """The finalist of the best mean; without finalists the best training."""
    alike: list[Point]
    """`best`, and the points that are not worse by more than the spread explains, `Spread.differ`; all, without one."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the metric at `best`, over seeds."""
        if self.spread is None:
            return None
        values = self.values[self.best]
        mean, half = fmean(values), self.spread.half_width(len(values))
        return mean - half, mean + half

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Smallest and largest alpha and beta of the points alike."""
        return {
            name: (min(values), max(values))
            for name in ("alpha", "beta")
            for values in [[getattr(point, name) for point in self.alike]]
        }


def finalists(search: Search, trials: Sequence[Trial]) -> list[Point]:
    """The best points of the search, as many as were asked for, the best first."""
    found = [(point, trial) for point, trial in _finished(trials) if trial.seed is None]
    found.sort(key=lambda each: search.metric.best_first(_value(each[1])))
    return [point for point, _ in found[: search.num_finalists]]


def conclude(search: Search, trials: Sequence[Trial]) -> Conclusion | None:
    """None where no training is finished."""
    once: dict[Point, list[float]] = defaultdict(list)
    repeated: dict[Point, list[float]] = defaultdict(list)
    for point, trial in _finished(trials):
        (once if trial.seed is None else repeated)[point].append(_value(trial))
    if not once:
        return None

    def first(item: tuple[Point, list[float]]) -> float:
        return search.metric.best_first(fmean(item[1]))

    values = dict(sorted((once | repeated).items(), key=first))  # a finalist's first training is what chose it
    best = next(point for point in values if point in (repeated or once))
    spread = pooled(list(repeated.values()))

    def is_worse(point: Point) -> bool:
        is_behind = search.metric.is_better(fmean(values[best]), fmean(values[point]))
        return spread is not None and is_behind and spread.differ(values[best], values[point])

    return Conclusion(values, spread, best, [point for point in values if not is_worse(point)])


def _finished(trials: Sequence[Trial]) -> list[tuple[Point, Trial]]:
    return [(each.point, each) for each in trials if each.state == "finished" and each.point]


def _value(trial: Trial) -> float:
    assert trial.value is not None
    return trial.value


def surface_rows(search: Search, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """A row for each finished training: alpha, beta and the measures after it by name; rows of one point are repeats.

    Where learning rates were searched: of each alpha and beta the rows of the best rate.
    """
    found = conclude(search, trials)
    if found is None:
        return []
    at_best_rate: dict[tuple[float, float], Point] = {}
    for point in found.values:
        at_best_rate.setdefault(point[:2], point)
    return [
        {"alpha": point.alpha, "beta": point.beta, **trial.noted["measures"]}
        for point, trial in _finished(trials)
        if point == at_best_rate[point[:2]]
    ]


def as_json(search: Search, trials: Sequence[Trial]) -> dict[str, Any]:
    """What tune.json holds."""
    found = conclude(search, trials)
    plane = search.plane
    return {
        "metric": search.metric.name,
        "greater_is_better": search.metric.greater_is_better,
        "sampler": search.sampler,
        "alpha": [plane.alpha.low, plane.alpha.high],
        "beta": [plane.beta.low, plane.beta.high],
        "line": plane.line and str(plane.line),
        "recommended": found and _recommended(found),
        "points": found and [_point_row(found, point) for point in found.values],
        "trials": [_trial_row(each) for each in trials],
        "surface": surface_rows(search, trials),
    }


def _recommended(found: Conclusion) -> dict[str, Any]:
    spread = found.spread
    return {
        **found.best._asdict(),
        "mean": fmean(found.values[found.best]),
        "interval": found.interval,
        "sd_over_seeds": spread and spread.sd,
        "dof": spread and spread.dof,
        "t": spread and spread.t,
        "ranges_alike": found.ranges,
    }


def _point_row(found: Conclusion, point: Point) -> dict[str, Any]:
    values = found.values[point]
    return {
        **point._asdict(),
        "mean": fmean(values),
        "sd": stdev(values) if len(values) > 1 else None,
        "num_trainings": len(values),
        "is_alike": point in found.alike,
    }


def _trial_row(trial: Trial) -> dict[str, Any]:
    point = trial.point._asdict() if trial.point else {}
    noted = {key: value for key, value in trial.noted.items() if key not in ("key", "owner")}
    noted |= {"host": owner["host"]} if (owner := trial.noted.get("owner")) else {}
    row = {"trial": trial.number, "state": trial.state, "seed": trial.seed, **point, "value": trial.value}
    return row | {"short": {f"{share:.4g}": value for share, value in trial.short.items()}} | noted


def lines(search: Search, trials: Sequence[Trial]) -> list[str]:
    """For a terminal: a line a point, the recommended first, then what that means."""
    found = conclude(search, trials)
    if found is None:
        return ["no training finished"]
    metric = search.metric
    better = "higher" if metric.greater_is_better else "lower"
    shown = [f"{'alpha':>8} {'beta':>8} {'rate' if search.rates else '':>8} {metric.name} ({better} is better)"]
    for point in sorted(found.values, key=lambda each: each != found.best)[:NUM_SHOWN]:
        row = _point_row(found, point)
        rate = "" if point.learning_rate is None else f"{point.learning_rate:g}"
        spread = f" ± {row['sd']:.4f} ({row['num_trainings']} seeds)" if row["sd"] is not None else ""
        verdict = "recommended" if point == found.best else "not told apart" if row["is_alike"] else "worse"
        told = verdict if found.spread or point == found.best else ""
        shown.append(f"{point.alpha:8g} {point.beta:8g} {rate:>8} {row['mean']:.4f}{spread}  {told}".rstrip())
    shown += [f"... and {len(found.values) - NUM_SHOWN} more"] if len(found.values) > NUM_SHOWN else []
    stopped = [f"{each.point}: {_stopped(search, each)}" for each in trials if each.state in ("pruned", "failed")]
    return [*shown, *stopped, *_meaning(search, found)]


def _stopped(search: Search, trial: Trial) -> str:
    if trial.state == "failed":
        return f"failed, {trial.noted['error']}"
    share, value = max(trial.short.items())
    return f"pruned after {share:.2g} of the training, with {search.metric.name} {value:.4f}"


def _meaning(search: Search, found: Conclusion) -> list[str]:
    name, mean = search.metric.name, fmean(found.values[found.best])
    if found.spread is None or found.interval is None:
        return [f"recommended: {found.best}, {name} {mean:.4f}; one training each tells nothing of the spread"]
    spread, (low, high) = found.spread, found.interval
    (alpha_low, alpha_high), (beta_low, beta_high) = found.ranges.values()
    return [
        f"recommended: {found.best}, {name} {mean:.4f}, 95 % interval over seeds {low:.4f} to {high:.4f}",
        f"not told apart from it: {len(found.alike) - 1} of {len(found.values) - 1} points, "
        f"alpha {alpha_low:g} to {alpha_high:g}, beta {beta_low:g} to {beta_high:g}; a difference counts above "
        f"t({spread.dof}) sd sqrt(1/n + 1/m) = {spread.t:.2f} x {spread.sd:.2g} x sqrt(1/n + 1/m), for n and m seeds",
    ]
