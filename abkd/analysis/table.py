"""The before/after table, for a terminal."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = {
    "forward_kl": ("forward KL", "{:.3f}"),
    "reverse_kl": ("reverse KL", "{:.3f}"),
    "alpha_beta": ("α-β (.2, .7)", "{:.3f}"),
    "token_agreement": ("agreement", "{:.1%}"),
    "next_token_loss": ("next-token", "{:.3f}"),
    "rouge_l": ("ROUGE-L", "{:.1f}"),
    "num_parameters": ("parameters", "{:,}"),
}
IMAGE_COLUMNS = {
    "top1": ("top-1", "{:.2%}"),
    "top1_interval": ("95 % of it", "{0[0]:.1%} to {0[1]:.1%}"),
    "top5": ("top-5", "{:.2%}"),
    "agreement": ("agreement", "{:.1%}"),
    "cross_entropy": ("cross-entropy", "{:.3f}"),
    "forward_kl": ("forward KL", "{:.3f}"),
    "entropy": ("entropy", "{:.3f}"),
    "calibration_error": ("ECE", "{:.3f}"),
    "num_parameters": ("parameters", "{:,}"),
}
BASE_TO_NEW = {"base_accuracy": "base", "new_accuracy": "new", "harmonic_mean": "harmonic mean"}
MIN_WIDTH = 110
IMAGE_TITLE = """Test images. Agreement: images where student and teacher prefer the same class. Cross-entropy with the
labels, divergence from the teacher and entropy: nats per image. ECE: expected calibration error."""
TITLE = """Validation. Divergences from the teacher and next-token loss on the data: nats per token, lower is better.
Agreement: tokens where student and teacher prefer the same one."""
BASE_TO_NEW_TITLE = "Accuracy on base classes among themselves,\non new ones among themselves"
SETS_TITLE = """Evaluation sets: mean over prompts and sampling seeds, (standard deviation over seeds), 95 % bootstrap
interval over the prompts. ROUGE-L or exact match, 0 to 100; Self-BLEU: how alike the answers are.
Entropy: of the model's rows on the validation completions, nats per token."""


def print_table(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Measures of several models under each other; lower is better but for accuracies, agreement and ROUGE-L.

    Args:
        rows: name -> the measures of `measures.measure`; a measure that none has gets no column. Evaluation sets get a
            table of their own.
    """
    of_images = any("top1" in row for row in rows.values())
    columns, title = (IMAGE_COLUMNS, IMAGE_TITLE) if of_images else (COLUMNS, TITLE)
    shown = [key for key in columns if any(key in row for row in rows.values())]
    for known_by in dict.fromkeys(row["teacher_known_by"] for row in rows.values() if "teacher_known_by" in row):
        title += f"\nThe teacher's rows are not whole ({known_by}): divergences from it are approximate."
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold", min_width=8)
    for key in shown:
        table.add_column(columns[key][0], justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, *(columns[key][1].format(row[key]) if key in row else "" for key in shown))
    console = Console(width=max(Console().width, MIN_WIDTH))
    console.print(table)
    if any("harmonic_mean" in row for row in rows.values()):
        console.print(_base_to_new_table(rows))
    if any("sets" in row for row in rows.values()):
        console.print(_sets_table(rows))


def _base_to_new_table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=BASE_TO_NEW_TITLE, title_justify="left")
    table.add_column("", overflow="fold", min_width=8)
    for name in BASE_TO_NEW.values():
        table.add_column(name, justify="right", no_wrap=True)
    for model, row in rows.items():
        table.add_row(model, *("" if row.get(key) is None else f"{row[key]:.2%}" for key in BASE_TO_NEW))
    return table


def _sets_table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows.values() for name in row.get("sets", {})))
    table = Table(title=SETS_TITLE, title_justify="left")
    table.add_column("", overflow="fold", min_width=8)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("mean", justify="right", no_wrap=True)
    table.add_column("Self-BLEU", justify="right", no_wrap=True)
    table.add_column("entropy", justify="right", no_wrap=True)
    for model, row in rows.items():
        if sets := row.get("sets"):
            alike = [each["self_bleu"] for each in sets.values() if each["self_bleu"] is not None]
            self_bleu = f"{fmean(alike):.1f}" if alike else ""
            cells = [_set_cell(sets[name]) if name in sets else "" for name in names]
            table.add_row(model, *cells, f"{row['sets_mean']:.1f}", self_bleu, f"{row['entropy']:.2f}")
    return table


def _set_cell(measured: Mapping[str, Any]) -> str:
    spread = "" if measured["sd"] is None else f" ({measured['sd']:.2f})"
    low, high = measured["interval"]
    return f"{measured['mean']:.1f}{spread}\n{low:.1f} to {high:.1f}"


def advice_lines(overview: Any, advice: Any) -> list[str]:
    """An `Overview` and its `Advice` in lines for a terminal."""
    lines = [
        f"{overview.num_rows:,} rows of {overview.num_classes:,} classes",
        f"entropy: teacher {overview.teacher_entropy:.2f}, student {overview.student_entropy:.2f} nats",
        f"the teacher's mass outside its first class: {overview.outside_top:.2f}",
        f"overlap of teacher and student, sum min(p, q): {overview.overlap:.2f}; "
        f"same first class: {overview.agreement:.0%}",
        "of the mass that one step would move: to under-estimated classes, to the teacher's first ten, out of its tail",
    ]
    for (alpha, beta), step in overview.steps.items():
        parts = (step.over_to_under, step.into_top, -step.into_tail)
        shares = "  ".join(f"{part / step.moved:6.1%}" if step.moved else "     -" for part in parts)
        lines.append(f"  ({alpha:g}, {beta:g})  {shares}")
    tried = " and ".join(f"({alpha:g}, {beta:g})" for alpha, beta in advice.neighbours)
    lines.append(f"start with alpha={advice.alpha:g} beta={advice.beta:g}, then try {tried}")
    lines += [f"  because of {reason}" for reason in advice.reasons]
    lines.append("this is a rule of thumb, not a measurement: abkd tune measures")
    return lines
