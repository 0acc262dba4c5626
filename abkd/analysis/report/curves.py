"""The lines of metrics.jsonl -> curves over the steps, several runs in one panel. Numbers in, numbers out."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from abkd.analysis.report.runs import Run

MOST_POINTS = 25
"""Of a curve: each point is the mean of as few consecutive lines as that takes, equally many in all of a panel."""
LOG_FROM = 20.0
"""A panel of positive values has a logarithmic axis where the largest is so many times the smallest; but `LINEAR`."""
NATS = "nats"
CURVES = {
    "loss": ("loss", NATS),
    "kd": ("divergence term", NATS),
    "ce": ("cross-entropy term", NATS),
    "lm": ("next-token loss on the corpus", NATS),
    "student_entropy": ("entropy of the student", NATS),
    "teacher_entropy": ("entropy of the teacher", NATS),
    "token_accuracy": ("accuracy", "share of tokens"),
    "accuracy": ("accuracy", "share of training images"),
    "token_agreement": ("agreement with the teacher", "share of tokens"),
    "agreement": ("agreement with the teacher", "share of training images"),
    "grad_norm": ("gradient norm, before clipping", ""),
    "learning_rate": ("learning rate", ""),
    "tokens_per_s": ("speed", "counted tokens per second"),
    "images_per_s": ("speed", "images per second"),
    "peak_memory_gib": ("peak memory", "GiB"),
}
"""Key of a line -> title and unit, in the order of the page; keys of docs/metrics.md that are not here follow."""
NOT_DRAWN = ("step", "epoch", "num_tokens", "num_images", "masked_share")
TERMS = ("kd", "ce", "lm")
LINEAR = ("learning_rate", "tokens_per_s", "images_per_s", "peak_memory_gib")


class Curve(NamedTuple):
    run: str
    steps: tuple[float, ...]
    means: tuple[float, ...]
    lows: tuple[float, ...]
    """Smallest of the lines that a point is the mean of."""
    highs: tuple[float, ...]


class Panel(NamedTuple):
    key: str
    title: str
    unit: str
    is_log: bool
    lines_per_point: int
    """Of each curve; the last point is the mean of those that are left."""
    curves: tuple[Curve, ...]


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Every figure of the log that moves, the known ones first; validations have panels of their own."""
    found = dict.fromkeys(key for run in runs for record in run.records for key in record)
    keys = [*(key for key in CURVES if key in found), *(key for key in found if key not in CURVES)]
    made = [_panel(key, runs) for key in keys if key.removeprefix("validation_") not in NOT_DRAWN]
    return [panel for panel in made if panel is not None]


def _panel(key: str, runs: Sequence[Run]) -> Panel | None:
    values = {run.name: finite for run in runs if not _is_no_term(run, key) and (finite := _finite(run, key))}
    size = math.ceil(max(map(len, values.values()), default=0) / MOST_POINTS)
    curves = [_curve(name, finite, size) for name, finite in values.items()]
    if not any(len(each.steps) > 1 for each in curves):
        return None
    name = key.removeprefix("validation_")
    title, unit = CURVES.get(key, (name.replace("_", " "), ""))
    low, high = min(min(each.means) for each in curves), max(max(each.means) for each in curves)
    if key.startswith("validation_"):
        title = f"{name.replace('_', ' ')} on validation"
    is_log = key not in LINEAR and low > 0 and high / low >= LOG_FROM
    return Panel(key, title, unit, is_log, size, tuple(curves))


def _finite(run: Run, key: str) -> list[tuple[int, float]]:
    """(step, value) of the lines where it is a finite number."""
    values = [(record["step"], record[key]) for record in run.records if key in record]
    return [(step, value) for step, value in values if type(value) in (int, float) and math.isfinite(value)]


def _curve(name: str, finite: Sequence[tuple[int, float]], size: int) -> Curve:
    """Means of `size` consecutive lines; the last of those that are left."""
    chunks = [finite[start : start + size] for start in range(0, len(finite), size)]
    return Curve(
        name,
        tuple(sum(step for step, _ in chunk) / len(chunk) for chunk in chunks),
        tuple(sum(value for _, value in chunk) / len(chunk) for chunk in chunks),
        tuple(min(value for _, value in chunk) for chunk in chunks),
        tuple(max(value for _, value in chunk) for chunk in chunks),
    )


def _is_no_term(run: Run, key: str) -> bool:
    """Whether a part of the loss is 0, or is the whole loss, which has a panel already."""
    if key not in TERMS:
        return False
    pairs = [(record[key], record["loss"]) for record in run.records if key in record and "loss" in record]
    return all(term == 0 for term, _ in pairs) or all(math.isclose(*pair, rel_tol=1e-4) for pair in pairs)
