"""The sections of a report that show figures side by side: mass by rank, the plane, answers."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from abkd.analysis.report import svg
from abkd.analysis.report.markup import Markup, element, joined
from abkd.analysis.report.plane import Spot, shade
from abkd.analysis.report.plane import plane as draw_plane
from abkd.analysis.report.sections import Colours, chip, note, row, table
from abkd.analysis.report.settings import Comparison, Setting, references
from abkd.analysis.report.words import CHOICE, NAMED, Measure, measure_of, number_words, path_in_plane

MOST_ANSWERS = {"validation": 6, "set": 3}
MOST_LETTERS = 1500


def mass(comparison: Comparison, colours: Colours) -> list[Markup | None]:
    """Where teacher and students have their probability, by the teacher's rank of the token."""
    masses = _masses(comparison)
    buckets = [str(label) for label in masses[0][1]["labels"]] if masses else []
    if not masses or any(len(each["shares"]) != len(buckets) for _, each in masses):
        return []
    legend = [element("span", element("i", class_=f"b{min(index, 6)}"), label) for index, label in enumerate(buckets)]
    drawing = svg.mass_bars([name for name, _ in masses], buckets, [each["shares"] for _, each in masses])
    rows = []
    for _, each in masses:
        pairs = zip(buckets, each["shares"], strict=True)
        rows.append(row(each["key"], [element("td", f"{share:.1%}", data_bucket=label) for label, share in pairs]))
    words = note(
        "Mean probability of the tokens that the teacher ranks first, second, and so on, over the validation tokens.",
        " Blue is the teacher’s head, orange the tail that it hardly believes in.",
    )
    both = element("div", element("figure", drawing), table(["Rank", *buckets], rows, "Mass by rank"), class_="grid-2")
    return [words, element("p", "Teacher’s rank: ", legend, class_="legend"), both]


def _masses(comparison: Comparison) -> list[tuple[str, dict[str, Any]]]:
    """(name, its key, labels and shares): teacher, student before, the mean over the seeds of each setting."""
    voices = [(name, name, rows[:1]) for name, rows in references(comparison)]
    for setting in comparison.settings:
        finished = [run.results["after"] for run in setting.runs if "after" in run.results]
        voices.append((setting.key, f"{setting.key} {setting.label}", finished))
    found = []
    for key, name, rows in voices:
        masses = [each["rank_mass"] for each in rows if each.get("rank_mass")]
        whose = "teacher" if name == "teacher" else "student"
        shares = [fmean(column) for column in zip(*(each[whose] for each in masses), strict=False)]
        if shares and all(map(math.isfinite, shares)):
            found.append((name, {"key": key, "labels": masses[0]["labels"], "shares": shares}))
    return found


def plane(comparison: Comparison, colours: Colours, metric: str | None) -> list[Markup | None]:
    """The settings in the plane of alpha and beta, coloured by a measure; those of other divergences in the table."""
    key = metric or next((key for key in CHOICE if any(each.values(key) for each in comparison.settings)), None)
    means = {each.key: fmean(values) for each in comparison.settings if key and (values := each.values(key))}
    paths = {each.key: path_in_plane(each.runs[0].recipe) for each in comparison.settings}
    if not any(paths.values()):
        return []
    measure = measure_of(key or "")
    shades = _shades(means, measure.better)
    spots, rows = [], []
    for each in comparison.settings:
        path, value = paths[each.key], number_words(measure.form, means.get(each.key))
        rows.append(_plane_row(each, colours, path, value, shades.get(each.key)))
        if path is not None:
            spots.append(Spot(f"{each.key} {value}" if each.key in means else each.key, *path, shades.get(each.key)))
    beside = table(["Setting", "α", "β", measure.title if means else "–"], rows, "The plane in numbers")
    drawing = element("figure", draw_plane(spots, NAMED), class_="plane")
    words = note(
        f"Coloured by {measure.title} after training. " if means else "No setting has results yet. ",
        "A line to a point is the way of a schedule; – stands for a divergence outside the plane.",
    )
    legend = _shade_legend(means, measure) if len(set(means.values())) > 1 else None
    return [words, element("div", drawing, element("div", legend, beside), class_="grid-2")]


def answers(comparison: Comparison, colours: Colours) -> list[Markup | None]:
    """The same prompts answered by teacher, student before and students after."""
    voices = [(joined(name), rows[0]) for name, rows in references(comparison)]
    for setting in comparison.settings:
        finished = [run.results["after"] for run in setting.runs if "after" in run.results]
        if finished:
            voices.append((joined(chip(setting, colours[setting.key]), " ", setting.label), finished[0]))
    parts = _answered("Validation", [(name, each) for name, each in voices], MOST_ANSWERS["validation"])
    for name in dict.fromkeys(name for _, each in voices for name in each.get("sets", {})):
        of_set = [(voice, _first_seed(each.get("sets", {}).get(name, {}))) for voice, each in voices]
        parts += _answered(f"Evaluation set {name}", of_set, MOST_ANSWERS["set"])
    return [*parts]


def _plane_row(setting: Setting, colours: Colours, path: Any, value: str, share: float | None) -> Markup:
    """Letter, label, alpha, beta, value."""
    (first, low), (last, high) = path or ((None, None), (None, None))
    head = joined(chip(setting, colours[setting.key]), " ", setting.label)
    mark = element("i", class_="swatch", style=f"background:{shade(share)}") if share is not None else None
    cells = [_exponent(first, last), _exponent(low, high)]
    return row(head, [*cells, element("td", mark, value, data_plane=setting.key)])


def _exponent(first: float | None, last: float | None) -> str:
    if first is None or last is None:
        return "–"
    return f"{first:g}" if first == last else f"{first:g} → {last:g}"


def _shades(means: Mapping[str, float], better: str) -> dict[str, float]:
    """1 for the best, 0 for the worst; for the largest and the smallest where neither is better."""
    low, high = min(means.values(), default=0.0), max(means.values(), default=0.0)
    if low == high:
        return dict.fromkeys(means, 1.0)
    shares = {key: (mean - low) / (high - low) for key, mean in means.items()}
    return {key: 1 - share for key, share in shares.items()} if better == "lower" else shares


def _shade_legend(means: Mapping[str, float], measure: Measure) -> Markup:
    ends = sorted((min(means.values()), max(means.values())), reverse=measure.better == "lower")
    least, most = (number_words(measure.form, end) for end in ends)
    bars = [element("i", style=f"background:{shade(step / 11)}") for step in range(12)]
    worst, best = (" worst ", " best ") if measure.better else (" least ", " most ")
    return element("p", least, worst, element("span", bars, class_="ramp"), best, most, class_="legend")


def _first_seed(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The answers of an evaluation set's first sampling seed, as a validation has them."""
    found = measured.get("answers")
    first = found[0] if isinstance(found, list) and found else None
    return {"answers": first, "questions": measured.get("questions")}


def _answered(title: str, voices: Sequence[tuple[Any, Mapping[str, Any]]], most: int) -> list[Markup]:
    """Each prompt with what every voice says to it."""
    spoken = [(name, _texts(each, "answers")) for name, each in voices]
    count = max((len(texts) for _, texts in spoken), default=0)
    if not count:
        return []
    questions = max((_texts(each, "questions") for _, each in voices), key=len)
    parts = [
        element("h3", title, element("small", f" {min(most, count)} of {count} prompts") if count > most else None)
    ]
    for index in range(min(most, count)):
        asked = _text(questions[index]) if index < len(questions) else element("i", f"prompt {index + 1}")
        said = [
            element("div", element("h4", name), element("blockquote", _text(texts[index]), dir="auto"))
            for name, texts in spoken
            if index < len(texts)
        ]
        parts.append(
            element("article", element("p", asked, class_="prompt", dir="auto"), element("div", said, class_="voices"))
        )
    return parts


def _texts(measured: Mapping[str, Any], key: str) -> list[str]:
    found = measured.get(key)
    return found if isinstance(found, list) and all(isinstance(text, str) for text in found) else []


def _text(text: str) -> str:
    cut = len(text) - MOST_LETTERS
    text = text.strip() if cut <= 0 else f"{text[:MOST_LETTERS].strip()} … ({cut:,} more characters)"
    return text or "(empty)"
