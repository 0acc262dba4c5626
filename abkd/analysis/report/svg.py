"""Drawings of numbers as SVG: sharp at any size, coloured by the page's CSS, named by labels beside the lines."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from abkd.analysis.report.curves import Panel
from abkd.analysis.report.markup import Markup, element

WIDTH, HEIGHT = 460.0, 236.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 16.0, 10.0, 34.0
LINE = 13.0
"""Height of a line of text."""
LETTER = 6.6
"""Width of a letter, about."""
NUM_COLOURS = 7
DASHES = (None, "6 3", "2 3", "8 3 2 3")


class Scale(NamedTuple):
    """Values low..high -> places start..stop."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(each) if self.is_log else each for each in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    @property
    def ticks(self) -> list[float]:
        if self.is_log:
            return _log_ticks(self.low, self.high)
        step = _step((self.high - self.low) / 4)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


class Label(NamedTuple):
    """What a run is called in a drawing."""

    text: str
    colour: int
    """Number of its setting: gives colour and dashes."""


def scale_of(values: Sequence[float], start: float, stop: float, is_log: bool = False) -> Scale:
    """Holds all values; from 0 where the smallest is near it, compared with the largest."""
    low, high = min(values), max(values)
    if is_log:
        return Scale(low / 1.1, high * 1.1, start, stop, is_log)
    if 0 <= low < 0.3 * high:
        low = 0.0
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    step = _step((high - low) / 4)
    return Scale(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, start, stop)


def line_chart(panel: Panel, labels: dict[str, Label]) -> Markup:
    """Curves over the steps, each named at its end; of a few curves the range of the lines behind each point too."""
    shows_range = len(panel.curves) <= 3
    low = [v for each in panel.curves for v in (each.lows if shows_range else each.means)]
    high = [v for each in panel.curves for v in (each.highs if shows_range else each.means)]
    named = list(dict.fromkeys(labels[each.run] for each in panel.curves))
    height = max(HEIGHT, LINE * len(named) + TOP + BOTTOM)
    steps = [step for each in panel.curves for step in each.steps]
    right = WIDTH - RIGHT - max(len(each.text) for each in named) * LETTER
    x = scale_of(steps, LEFT, right)
    x = Scale(x.low, max(steps), LEFT, right)
    y = scale_of(low + high, height - BOTTOM, TOP, panel.is_log and min(low) > 0)
    parts: list[Any] = [axes(x, y, "optimiser step")]
    if shows_range:
        parts += [_range(each, x, y, labels[each.run]) for each in panel.curves]
    parts += [_line(each, x, y, labels[each.run]) for each in panel.curves]
    ends = {label: _end(panel, label, labels, x, y) for label in named}
    return drawing(
        WIDTH, height, f"{panel.title} over the optimiser steps", parts, _end_labels(ends, right + RIGHT, height)
    )


def mass_bars(names: Sequence[str], buckets: Sequence[str], rows: Sequence[Sequence[float]]) -> Markup:
    """One bar a model, its name above, split by the teacher's rank of the token."""
    x, parts = Scale(0, 1, 0, WIDTH), []
    for index, (name, shares) in enumerate(zip(names, rows, strict=True)):
        top, left = index * 38.0, 0.0
        parts.append(element("text", name, x=0.0, y=top + 12, class_="name"))
        for bucket, (label, share) in enumerate(zip(buckets, shares, strict=True)):
            width = x(share)
            title = element("title", f"{name}, rank {label}: {share:.2%}")
            parts.append(
                element("rect", title, x=left, y=top + 17, width=width, height=16.0, class_=f"bucket b{min(bucket, 6)}")
            )
            if width > 28:
                text = element("text", f"{share:.0%}", x=left + width / 2, y=top + 29, class_=f"in t{min(bucket, 6)}")
                parts.append(text)
            left += width
    return drawing(WIDTH, 38.0 * len(rows), "Probability mass by the teacher's rank", parts)


def tick_words(value: float) -> str:
    """0.00025, 0.5, 20, 1.2k, 3M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def axes(x: Scale, y: Scale, x_name: str) -> list[Markup]:
    """Grid, ticks and the base line; `data-at` of a tick is its place."""
    parts = []
    for value in y.ticks:
        place = y(value)
        parts.append(element("path", d=f"M{x.start:.1f} {place:.1f}H{x.stop:.1f}", class_="grid"))
        parts.append(element("text", tick_words(value), x=x.start - 6, y=place + 4, class_="tick-y", data_at=place))
    for value in x.ticks:
        place = x(value)
        parts.append(element("path", d=f"M{place:.1f} {y.start:.1f}v4", class_="grid"))
        parts.append(element("text", tick_words(value), x=place, y=y.start + 15, class_="tick-x", data_at=place))
    parts.append(element("path", d=f"M{x.start:.1f} {y.start:.1f}H{x.stop:.1f}", class_="base"))
    parts.append(element("text", x_name, x=x.stop, y=y.start + 29, class_="axis end"))
    return parts


def _line(curve, x: Scale, y: Scale, label: Label) -> Markup:
    places = [(x(step), y(value)) for step, value in zip(curve.steps, curve.means, strict=True)]
    path = "M" + "L".join(f"{across:.2f} {down:.2f}" for across, down in places)
    line = element("path", d=path, class_="line", stroke_dasharray=_dashes(label), data_run=curve.run)
    if len(places) > 12:
        return element("g", line, class_=_colour(label))
    return element(
        "g", line, [element("circle", cx=a, cy=b, r=2.2, class_="dot") for a, b in places], class_=_colour(label)
    )


def _range(curve, x: Scale, y: Scale, label: Label) -> Markup | None:
    if curve.lows == curve.highs:
        return None
    upper = [(x(step), y(value)) for step, value in zip(curve.steps, curve.highs, strict=True)]
    lower = [(x(step), y(value)) for step, value in zip(curve.steps, curve.lows, strict=True)]
    path = "M" + "L".join(f"{across:.1f} {down:.1f}" for across, down in [*upper, *reversed(lower)]) + "Z"
    return element("g", element("path", d=path, class_="range"), class_=_colour(label))


def _end(panel: Panel, label: Label, labels: dict[str, Label], x: Scale, y: Scale) -> tuple[float, float]:
    """Where the longest curve of a setting ends."""
    curve = max((each for each in panel.curves if labels[each.run] == label), key=lambda each: each.steps[-1])
    return x(curve.steps[-1]), y(curve.means[-1])


def _end_labels(ends: dict[Label, tuple[float, float]], left: float, height: float) -> list[Markup]:
    """Names at the right, in the order of the ends, none over another, each with a line to its curve."""
    order = sorted(ends, key=lambda label: ends[label][1])
    places = [max(ends[label][1], TOP + LINE * (index + 0.5)) for index, label in enumerate(order)]
    floor = height - BOTTOM
    for index in range(len(order)):
        places[index] = max(places[index], places[index - 1] + LINE if index else places[index])
    for index in reversed(range(len(order))):
        places[index] = min(places[index], floor)
        floor = places[index] - LINE
    parts: list[Markup] = []
    for label, place in zip(order, places, strict=True):
        across, down = ends[label]
        lead = f"M{across:.1f} {down:.1f}L{left - 3:.1f} {place:.1f}"
        parts.append(element("g", element("path", d=lead, class_="lead-line"), class_=_colour(label)))
        parts.append(element("text", label.text, x=left, y=place + 4, class_="label"))
    return parts if any(label.text for label in ends) else []


def _step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**decade for decade in decades for factor in factors]
        found = [value for value in found if low <= value <= high]
        if len(found) >= 3:
            break
    return found[:: math.ceil(len(found) / 6)]


def _colour(label: Label) -> str:
    return f"c{label.colour % NUM_COLOURS}"


def _dashes(label: Label) -> str | None:
    return DASHES[label.colour // NUM_COLOURS % len(DASHES)]


def drawing(width: float, height: float, title: str, *parts: Any) -> Markup:
    return element("svg", parts, viewBox=f"0 0 {width:.0f} {height:.0f}", role="img", aria_label=title)
