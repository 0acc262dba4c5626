"""The sections of a report, out of runs that were read: tables, drawings and words as markup."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from abkd.analysis.report import svg
from abkd.analysis.report.curves import Panel, panels
from abkd.analysis.report.markup import Markup, element, joined
from abkd.analysis.report.runs import Cost, Run, cost
from abkd.analysis.report.settings import Comparison, Setting
from abkd.analysis.report.words import facts, number_words
from abkd.rundir import RECIPE, RunDir

MOST_LETTERS = 24
"""Of a name beside a curve; where one is longer, all curves have their letter alone, and a legend says more."""
Colours = Mapping[str, int]
"""Letter of a setting -> number of its colour."""


def section(name: str, title: str, *content: Any) -> Markup | None:
    """None where there is nothing to show."""
    shown = [part for part in content if part]
    return element("section", element("h2", title), shown, id=name) if shown else None


def table(head: Sequence[Any], rows: Sequence[Markup], name: str) -> Markup:
    """Scrolls within its own box where the page is narrow."""
    cells = [element("th", title, scope="col") for title in head]
    inner = element("table", element("thead", element("tr", cells)), element("tbody", rows))
    return element("div", inner, class_="scroll", tabindex=0, role="region", aria_label=name)


def row(head: Any, cells: Sequence[Any], **attributes: Any) -> Markup:
    """Cells that are not <td> already become one."""
    made = [cell if isinstance(cell, Markup) and cell.startswith("<td") else element("td", cell) for cell in cells]
    return element("tr", element("th", head, scope="row"), made, **attributes)


def note(*content: Any) -> Markup:
    return element("p", content, class_="note")


def chip(setting: Setting, colour: int) -> Markup:
    """The letter of a setting in its colour."""
    return element(
        "span",
        setting.key,
        class_=f"chip c{colour % svg.NUM_COLOURS} dash{colour // svg.NUM_COLOURS % len(svg.DASHES)}",
    )


def _named(setting: Setting, colours: Colours) -> Markup:
    return element("span", chip(setting, colours[setting.key]), setting.label)


def colours(comparisons: Sequence[Comparison]) -> dict[str, int]:
    """Numbered through all comparisons."""
    return {each.key: index for index, each in enumerate(setting for one in comparisons for setting in one.settings)}


def overview(comparisons: Sequence[Comparison]) -> Markup | None:
    """What all runs have in common, and a table of what they have not."""
    runs = _pairs(comparisons)
    found = {id(run): facts(run.recipe, run.environment) for _, run in runs}
    titles = list(dict.fromkeys(title for each in found.values() for title in each))
    values = {title: [found[id(run)].get(title, "–") for _, run in runs] for title in titles}
    same = [title for title in titles if len(set(values[title])) == 1]
    others = [title for title in titles if title not in same]
    pairs = [element("div", element("dt", title), element("dd", values[title][0])) for title in same]
    colour = colours(comparisons)
    rows = [
        row(
            joined(chip(setting, colour[setting.key]), " ", run.name),
            [_state(run), *(values[title][index] for title in others)],
            data_run=run.name,
        )
        for index, (setting, run) in enumerate(runs)
    ]
    told = table(["Run", "State", *others], rows, "Runs")
    same_for_all = element("h3", "The same for all runs") if len(runs) > 1 else None
    return section("trained", "What was trained", told, same_for_all, element("dl", pairs, class_="facts"))


def curves(comparisons: Sequence[Comparison]) -> Markup | None:
    """A small drawing for each figure of the log, all runs in it."""
    colour = colours(comparisons)
    settings = [setting for one in comparisons for setting in one.settings]
    names = {each.key: f"{each.key} {each.label}" if len(settings) > 1 else "" for each in settings}
    legend = None
    if max(map(len, names.values())) > MOST_LETTERS:
        names = {each.key: each.key for each in settings}
        legend = element("p", [_named(each, colour) for each in settings], class_="legend names")
    labels = {run.name: svg.Label(names[each.key], colour[each.key]) for each in settings for run in each.runs}
    made = panels([run for one in comparisons for run in one.runs])
    if not made:
        return section("curves", "Curves", note("No run has logged two lines yet."))
    figures = [_figure(panel, labels) for panel in made]
    words = note(
        "Over the optimiser steps. A point is the mean of as many lines of metrics.jsonl as is said; the band behind a",
        " curve, where few are drawn, is their range. Losses of different objectives are different quantities.",
    )
    return section("curves", "Curves", words, legend, element("div", figures, class_="grid-2"))


def costs(comparisons: Sequence[Comparison]) -> Markup | None:
    """Time, steps, what was counted, speed, memory, size."""
    colour = colours(comparisons)
    rows: list[Markup] = []
    for setting, run in _pairs(comparisons):
        spent = cost(run)
        head = joined(chip(setting, colour[setting.key]), " ", run.name)
        rows.append(row(head, [_cell(key, *shown) for key, shown in _cost_cells(spent).items()], data_run=run.name))
    columns = ["Run", "Training", "Steps", "Counted", "Speed (median)", "Peak memory", "Parameters of the student"]
    words = note(
        "Training alone, without loading and measuring; a run that was resumed does not know it. Counted: tokens of",
        " completions, or images, over all logged steps. Memory: of tensors on a GPU, of the whole process on a CPU.",
    )
    return section("cost", "Cost", table(columns, rows, "Cost"), words)


def warnings(runs: Sequence[Run]) -> Markup | None:
    """What the training said of itself."""
    rows = [row(run.name, [words], data_run=run.name) for run in runs for words in run.warnings]
    if not rows:
        return section("warnings", "Warnings", note("None was logged."))
    return section("warnings", "Warnings", table(["Run", "Said during training"], rows, "Warnings"))


def repeating(comparisons: Sequence[Comparison]) -> Markup | None:
    """The command that repeats each run, or goes on with it, and its recipe."""
    colour, parts = colours(comparisons), []
    for setting, run in _pairs(comparisons):
        title = element("h3", chip(setting, colour[setting.key]), " ", run.name)
        commands = [_command("Repeat it", repeat_command(run))]
        if not run.is_finished:
            commands.insert(0, _command("Go on with it", RunDir(run.path).how_to_go_on))
        started = run.environment.get("command")
        if isinstance(started, list):
            commands.append(_command("Started by", shlex.join(map(str, started))))
        recipe = element("details", element("summary", RECIPE), element("pre", run.recipe_text))
        parts.append(element("article", title, commands, recipe, data_run=run.name))
    return section("repeat", "Repeat it", parts)


def repeat_command(run: Run) -> str:
    """What makes the same run anew, in another folder."""
    again = f"abkd train {shlex.quote(str(run.path / RECIPE))} {shlex.quote(f'run_dir={run.path}-again')}"
    count = run.environment.get("num_processes", 1)
    return again if count == 1 else f"torchrun --nproc-per-node {count} -m {again}"


def _pairs(comparisons: Sequence[Comparison]) -> list[tuple[Setting, Run]]:
    return [(setting, run) for one in comparisons for setting in one.settings for run in setting.runs]


def _cost_cells(spent: Cost) -> dict[str, tuple[str, str]]:
    """Key -> number and unit."""
    return {
        "training_s": (_duration(spent.training_s), ""),
        "num_steps": (f"{spent.num_steps:,}", ""),
        "num_counted": (f"{spent.num_counted:,.0f}", spent.unit),
        "per_s": (number_words("{:,.1f}", spent.per_s), f"{spent.unit}/s"),
        "peak_memory_gib": (number_words("{:.2f}", spent.peak_memory_gib), "GiB"),
        "num_parameters": (number_words("{:,.0f}", spent.num_parameters), ""),
    }


def _cell(key: str, words: str, unit: str) -> Markup:
    return element("td", words, element("small", " ", unit) if unit and words != "–" else None, data_cost=key)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"


def _command(title: str, command: str) -> Markup:
    return element("p", element("span", title, class_="what"), element("code", command), class_="command")


def _state(run: Run) -> str:
    if run.is_finished:
        return "finished"
    num_steps = run.recipe["training"].get("num_steps")
    of_all = f" of {num_steps:,}" if num_steps else ""
    return f"unfinished, at step {run.last_step:,}{of_all}" if run.records else "nothing logged yet"


def _figure(panel: Panel, labels: Mapping[str, svg.Label]) -> Markup:
    size = panel.lines_per_point
    said = [panel.unit, "logarithmic" if panel.is_log else "", f"means of {size} lines" if size > 1 else ""]
    caption = element("figcaption", element("b", panel.title), " ", element("small", " · ".join(filter(None, said))))
    return element("figure", caption, svg.line_chart(panel, dict(labels)), data_panel=panel.key)
