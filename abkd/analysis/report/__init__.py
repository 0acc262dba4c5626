"""One HTML file that says what runs came to: no network, no script, opens from disk. Numbers in `runs` and `curves`."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template

from abkd.analysis.report import sections
from abkd.analysis.report.markup import Markup, element, joined
from abkd.analysis.report.results import results
from abkd.analysis.report.runs import Run, read_runs
from abkd.analysis.report.settings import Comparison, compare
from abkd.analysis.report.views import answers, mass, plane
from abkd.analysis.report.words import MEASURES, model_words
from abkd.errors import InputError

HERE = Path(__file__).parent
REPORT = "report.html"


def write_report(runs: Sequence[Path], file: Path, *, metric: str | None = None) -> None:
    """Reads the folders of runs and writes the page; renamed into place, so that it is whole or absent.

    Args:
        runs: finished, interrupted or only begun ones, of any tasks; one or many, or none.
        metric: what colours the plane of alpha and beta, a key of results.json; None takes the first that there is of
            the evaluation sets' mean, ROUGE-L, top-1, agreement and next-token loss.

    Raises:
        InputError: a folder is missing, torn or of something else, or the file cannot be written; names it.
    """
    page = report_page(read_runs(runs), metric)
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_text(page, encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        raise InputError(f"output: {str(file)!r} cannot be written ({error.strerror}); give another file") from None


def report_after(runs: Sequence[Path], file: Path, say: Callable[[str], None]) -> None:
    """`write_report` at the end of what must not fail for its sake: what goes wrong is said in one line."""
    try:
        write_report(runs, file)
        say(f"report: {file}")
    except Exception as error:
        say(f"no report was written ({type(error).__name__}: {error}); the run is not touched by that")


def report_page(runs: Sequence[Run], metric: str | None = None) -> str:
    """The whole page."""
    comparisons = compare(runs)
    if metric and not any(setting.values(metric) for one in comparisons for setting in one.settings) and runs:
        raise InputError(f"metric: no run has a figure {metric!r}; take one of {', '.join(MEASURES)}")
    parts = [
        sections.overview(comparisons) if runs else sections.note("There is no run to report."),
        *_compared(comparisons, sections.colours(comparisons), metric),
        *([sections.curves(comparisons), sections.costs(comparisons), sections.warnings(runs)] if runs else []),
        sections.repeating(comparisons),
    ]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    page = Template((HERE / "page.html").read_text(encoding="utf-8"))
    style = (HERE / "page.css").read_text(encoding="utf-8")
    body = joined([part for part in parts if part])
    return page.substitute(title=element("span", title), style=style, summary=_summary(runs, comparisons), body=body)


def _compared(comparisons: Sequence[Comparison], colours: Mapping[str, int], metric: str | None) -> list[Markup | None]:
    """Results, mass, plane and answers; each once for every comparison."""
    views = {
        ("results", "Results"): results,
        ("mass", "Where the probability mass is"): mass,
        ("plane", "The plane of α and β"): lambda one, each: plane(one, each, metric),
        ("answers", "Answers side by side"): answers,
    }
    made = []
    for (name, title), view in views.items():
        parts: list[Markup | None] = []
        for one in comparisons:
            shown = [part for part in view(one, colours) if part]
            parts += [_title_of(one), *shown] if shown and len(comparisons) > 1 else shown
        made.append(sections.section(name, title, *parts))
    return made


def _title_of(comparison: Comparison) -> Markup:
    recipe = comparison.runs[0].recipe
    keys = ", ".join(setting.key for setting in comparison.settings)
    teacher = model_words(recipe.get("teacher"))
    told = "without a teacher" if teacher == "none" else f"teacher {teacher}"
    return element("p", f"{keys}: {told}, data {recipe['data'].get('train')}", class_="group")


def _summary(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> Markup:
    finished = sum(run.is_finished for run in runs)
    num_settings = sum(len(one.settings) for one in comparisons)
    said = [f"{finished} of {len(runs)} finished", _count(num_settings, "setting")]
    if len(comparisons) > 1:
        said.append(f"{len(comparisons)} groups of runs with one teacher, data and protocol each")
    if num_warnings := sum(len(run.warnings) for run in runs):
        said.append(_count(num_warnings, "warning"))
    return joined(", ".join(said))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
