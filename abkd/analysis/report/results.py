"""The results of a report: tables of what was measured, and which differences are more than the spread over seeds."""

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from abkd.analysis.report.markup import Markup, element, joined
from abkd.analysis.report.runs import number
from abkd.analysis.report.sections import Colours, chip, note, row, table
from abkd.analysis.report.settings import Comparison, Setting, references
from abkd.analysis.report.words import MEASURES, measure_of, number_words
from abkd.analysis.spread import Spread, pooled

NOT_MEASURES = ("num_tokens", "num_images", "temperature", "teacher_top1")
MOST_PAIRS_OPEN = 10


def results(comparison: Comparison, colours: Colours) -> list[Markup | None]:
    """The table of teacher, students before and after, the sets, and which differences are more than spread."""
    if not any(run.results for run in comparison.runs):
        return [note("No run has results yet.")]
    keys = _measures(comparison)
    spreads = {key: _spread(comparison, key) for key in keys}
    rows = [_reference_row(name, measured, keys) for name, measured in references(comparison)]
    for setting in comparison.settings:
        rows += _setting_rows(setting, colours, keys, _best_of(comparison, setting, spreads))
    head = ["", *(_head(key) for key in keys)]
    unfinished = [run.name for run in comparison.runs if not run.is_finished]
    missing = note(f"No results yet: {', '.join(unfinished)}.") if unfinished else None
    shown = [table(head, rows, "Results"), _measured_on(comparison), missing, _sets_table(comparison, colours)]
    return [*shown, *_differences(comparison, spreads, colours), _classes(comparison, colours)]


def _measures(comparison: Comparison) -> list[str]:
    """Figures that any model has, the known ones first."""
    rows = [
        each for run in comparison.runs for role in ("teacher", "before", "after") if (each := run.results.get(role))
    ]
    found = dict.fromkeys(key for each in rows for key in each if number(each, key) is not None)
    known = [key for key in MEASURES if key in found]
    return known + [key for key in found if key not in MEASURES and key not in NOT_MEASURES]


def _spread(comparison: Comparison, key: str) -> Spread | None:
    return pooled([each.values(key) for each in comparison.settings])


def _best_of(comparison: Comparison, setting: Setting, spreads: Mapping[str, Spread | None]) -> set[str]:
    """Measures in which the setting is better than every other one by more than the spread explains."""
    found = set()
    for key, spread in spreads.items():
        others = [each.values(key) for each in comparison.settings if each.key != setting.key and each.values(key)]
        values, better = setting.values(key), measure_of(key).better
        if spread and better and values and others and all(_is_better(spread, values, each, better) for each in others):
            found.add(key)
    return found


def _is_better(spread: Spread, values: Sequence[float], others: Sequence[float], better: str) -> bool:
    ahead = fmean(values) < fmean(others) if better == "lower" else fmean(values) > fmean(others)
    return ahead and spread.differ(values, others)


def _head(key: str) -> Markup:
    measure = measure_of(key)
    arrow = {"lower": " ↓", "higher": " ↑"}.get(measure.better, "")
    return element("span", measure.title, arrow, title=measure.unit or None)


def _reference_row(name: str, measured: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> Markup:
    return row(name, [_cell(key, measured, name) for key in keys], class_="reference")


def _setting_rows(setting: Setting, colours: Colours, keys: Sequence[str], best: set[str]) -> list[Markup]:
    after = [(run, run.results["after"]) for run in setting.runs if "after" in run.results]
    if not after:
        return []
    head = joined(chip(setting, colours[setting.key]), " ", setting.label)
    if len(after) > 1:
        head = joined(head, element("small", f"{len(after)} seeds"))
    of_all = [each for _, each in after]
    rows = [row(head, [_cell(key, of_all, setting.key, key in best) for key in keys])]
    if len(after) > 1:
        rows += [
            row(f"seed {run.seed}", [_cell(key, [each], run.name) for key in keys], class_="seed")
            for run, each in after
        ]
    return rows


def _cell(key: str, measured: Sequence[Mapping[str, Any]], whose: str, is_best: bool = False) -> Markup:
    """The mean; below it the sd over seeds where they differ, or the interval of a single figure."""
    form = measure_of(key).form
    values = [value for each in measured if (value := number(each, key)) is not None]
    if not values:
        return element("td", "–")
    below = _interval(measured[0].get(f"{key}_interval"), form) if len(values) == 1 else None
    if len(set(values)) > 1:
        fewer = f", n = {len(values)}" if len(values) < len(measured) else ""
        below = f"sd {number_words(form, _sd(values))}{fewer}"
    shown = number_words(form, fmean(values))
    words = element("b", shown) if is_best else shown
    return element("td", words, element("small", below) if below else None, data_measure=key, data_of=whose)


def _sd(values: Sequence[float]) -> float:
    return stdev(values) if all(map(math.isfinite, values)) else math.nan


def _interval(bounds: Any, form: str) -> str | None:
    if not isinstance(bounds, list) or len(bounds) != 2 or not all(isinstance(each, (int, float)) for each in bounds):
        return None
    return " to ".join(number_words(form, each) for each in bounds)


def _measured_on(comparison: Comparison) -> Markup:
    of_images = any("num_images" in run.results.get("before", {}) for run in comparison.runs)
    unit = "images" if of_images else "tokens"
    found = [number(run.results.get("before", {}), f"num_{unit}") for run in comparison.runs]
    counts = {count for count in found if count is not None}
    where = f"On {' or '.join(f'{count:,}' for count in sorted(counts))} " if counts else "On the "
    where += "test images; below a share its 95 % Wilson interval. " if of_images else "tokens of validation data. "
    return note(
        where,
        f"Divergences are from the teacher, in nats per {unit[:-1]}. ↓ lower is better, ↑ higher. Several seeds of a",
        " setting: mean, standard deviation (n − 1). Bold: better than every other setting by more than the spread.",
    )


def _sets_table(comparison: Comparison, colours: Colours) -> Markup | None:
    voices: list[tuple[Markup, str, Mapping[str, Any], str | None]]
    voices = [(joined(name), name, rows[0], None) for name, rows in references(comparison)]
    for setting in comparison.settings:
        after = [(run, run.results["after"]) for run in setting.runs if "after" in run.results]
        for place, (run, measured) in enumerate(after):
            seed = f", seed {run.seed}" if len(after) > 1 else ""
            head = joined(chip(setting, colours[setting.key]), " ", setting.label, seed) if not place else seed[2:]
            voices.append((joined(head), run.name, measured, "seed" if place else None))
    names = list(dict.fromkeys(name for _, _, measured, _ in voices for name in measured.get("sets", {})))
    if not names:
        return None
    rows = [
        row(head, [_set_cell(measured.get("sets", {}).get(name), name, whose) for name in names], class_=kind)
        for head, whose, measured, kind in voices
    ]
    words = note(
        "Mean over prompts and sampling seeds, 0 to 100 (standard deviation over the sampling seeds); below it its",
        " 95 % bootstrap interval over the prompts: other prompts of the same kind, not another training. Self-BLEU:",
        " how alike the answers are.",
    )
    return joined(element("h3", "Evaluation sets"), table(["", *names], rows, "Evaluation sets"), words)


def _set_cell(measured: Mapping[str, Any] | None, name: str, whose: str) -> Markup:
    if measured is None:
        return element("td", "–")
    spread, alike = number(measured, "sd"), number(measured, "self_bleu")
    said = [
        None if alike is None else f"Self-BLEU {alike:.1f}",
        None if (ended := number(measured, "ended")) is None else f"{ended:.0%} ended",
    ]
    below = [_interval(measured.get("interval"), "{:.1f}"), ", ".join(filter(None, said))]
    return element(
        "td",
        f"{measured['mean']:.1f}",
        None if spread is None else f" ({spread:.2f})",
        [element("small", words) for words in below if words],
        data_set=name,
        data_of=whose,
    )


def _differences(comparison: Comparison, spreads: Mapping[str, Spread | None], colours: Colours) -> list[Markup | None]:
    """Every two settings in every measure that has a better side."""
    if len([each for each in comparison.settings if any("after" in run.results for run in each.runs)]) < 2:
        return []
    told = {key: spread for key, spread in spreads.items() if spread and measure_of(key).better}
    if not told:
        return [note("One training a setting: its spread over seeds is not known, and no difference is called one.")]
    pairs = list(itertools.combinations([each for each in comparison.settings if each.values(next(iter(told)))], 2))
    rows = [
        row(
            joined(chip(one, colours[one.key]), " − ", chip(other, colours[other.key])),
            [_difference(key, spread, one, other) for key, spread in told.items()],
        )
        for one, other in pairs
    ]
    words = note(
        "A difference of two means is called one, in bold, where it is larger than t · s · √(1/n + 1/m), the",
        " number after ±: s is the standard deviation over seeds, pooled over the settings, t Student’s at 95 %. Seeds",
        " alone explain smaller ones. Nothing is added for the number of comparisons.",
    )
    shown = table(["", *(measure_of(key).title for key in told)], rows, "Differences")
    if len(pairs) > MOST_PAIRS_OPEN:
        shown = element("details", element("summary", f"All {len(pairs)} pairs"), shown)
    return [element("h3", "Differences"), shown, words]


def _difference(key: str, spread: Spread, one: Setting, other: Setting) -> Markup:
    values, others, form = one.values(key), other.values(key), measure_of(key).form
    if not values or not others:
        return element("td", "–")
    change, half = fmean(values) - fmean(others), spread.half_width(len(values), len(others))
    words = number_words(form, change) if change < 0 else f"+{number_words(form, change)}"
    words = words.replace("%", " pp")
    is_one = spread.differ(values, others)
    return element(
        "td",
        element("b", words) if is_one else words,
        element("small", f"± {number_words(form, half)}".replace("%", " pp")),
        data_measure=key,
        data_of=f"{one.key}-{other.key}",
    )


def _classes(comparison: Comparison, colours: Colours) -> Markup | None:
    """Accuracy of each class and what is taken for what, of image classifiers."""
    voices = [(joined(name), rows[0]) for name, rows in references(comparison)]
    for setting in comparison.settings:
        finished = [run.results["after"] for run in setting.runs if "after" in run.results]
        voices += [(joined(chip(setting, colours[setting.key]), " ", setting.label), each) for each in finished[:1]]
    voices = [(head, each) for head, each in voices if isinstance(each.get("per_class"), list)]
    if not voices:
        return None
    shares = [{str(name): share for name, _, share in each["per_class"]} for _, each in voices]
    order = sorted(shares[-1], key=lambda name: (shares[-1][name], name))
    rows = [
        row(name, [f"{each[name]:.1%}" if name in each else "–" for each in shares], data_class=name) for name in order
    ]
    wrong = [
        row(head, [f"{truth} taken for {taken}", f"{count:,}", f"{share:.1%}"])
        for head, each in voices
        for truth, taken, count, share in each.get("confusions", [])[:10]
    ]
    parts = [table(["Class", *(head for head, _ in voices)], rows, "Accuracy by class")]
    if wrong:
        parts.append(table(["", "Confusion", "Images", "Of the class"], wrong, "Confusions"))
    return element("details", element("summary", "Classes and confusions"), parts)
