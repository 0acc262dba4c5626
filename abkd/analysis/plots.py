"""Drawings of numbers that other modules computed. The only file that imports matplotlib."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from abkd import divergences
from abkd.analysis.mass import RankMass
from abkd.analysis.panels import Bars, Curve, Curves, Panel, Plane, Surface, rank_mass_bars

Style = tuple[str, str, str]
"""Colour, marker, line."""
STYLES: dict[str, Style] = {
    "forward KL": ("#0072B2", "o", "-"),
    "reverse KL": ("#D55E00", "s", "--"),
    "alpha-beta": ("#009E73", "^", "-"),
    "α-β": ("#009E73", "^", "-"),
    "α-divergence": ("#CC79A7", "D", "-."),
    "teacher": ("#000000", "", "-"),
    "before": ("#999999", "x", ":"),
}
"""First words of a label -> its style. Okabe and Ito's palette: told apart with any kind of colour vision, and in print
by the markers and lines."""
OTHER_STYLES: tuple[Style, ...] = (
    ("#0072B2", "o", "-"), ("#E69F00", "v", "--"), ("#009E73", "^", "-."), ("#D55E00", "s", ":"), ("#CC79A7", "D", "-"),
    ("#56B4E9", "P", "--"), ("#000000", "X", "-."), ("#999999", "*", ":"),
)  # fmt: skip
"""Of all other labels of a panel, in their order; the ninth looks like the first."""
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "", "--")
NAMED = {
    "forward KL": (divergences.FORWARD_KL, (8, 4)),
    "reverse KL": (divergences.REVERSE_KL, (8, 4)),
    "Hellinger": (divergences.HELLINGER, (8, 4)),
    "squared Euclidean": (divergences.EUCLIDEAN, (8, 4)),
    "Itakura-Saito": (divergences.ITAKURA_SAITO, (8, -4)),
    "log-Euclidean": (divergences.LOG_EUCLIDEAN, (-8, -14)),
    "Pearson χ²": (divergences.PEARSON, (8, -4)),
    "Neyman χ²": (divergences.NEYMAN, (-4, 8)),
    "(0.2, 0.7)\nlanguage models": (divergences.LLM, (-82, 0)),
    "(0.8, 0.3)\nCIFAR-100": (divergences.CIFAR, (-58, -18)),
}
"""Points of the plane with a name -> the divergence, and where its name stands, in points from it."""
PANEL_INCHES = (4.1, 3.5)
WIDE_PANEL_INCHES = (7.8, 3.5)
"""Of panels whose legend stands beside them."""
BESIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.02), "borderaxespad": 0.0}
"""Place of a legend."""


def draw(panels: Sequence[Panel], file: Path, layout: str = "") -> Path:
    """Draws the panels side by side into a PNG, and gives its path back.

    Args:
        panels: at least one.
        layout: a mosaic of letters, rows apart by semicolons, as in "aab;aac": the first panel at a, and so on. By
            default rows of four, or of two where a legend has much to say.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"[: len(panels)]
    wide = any(_is_wordy(panel) for panel in panels)
    columns = min(len(letters), 2 if wide else 4)
    in_order = [letters[start : start + columns].ljust(columns, ".") for start in range(0, len(letters), columns)]
    rows = layout.split(";") if layout else in_order
    width, height = WIDE_PANEL_INCHES if wide else PANEL_INCHES
    with plt.rc_context({"font.size": 10, "axes.titlesize": 10, "legend.fontsize": 8.5}):
        size = (width * len(rows[0]), height * len(rows))
        figure, axes = plt.subplot_mosaic([list(row) for row in rows], figsize=size, layout="constrained")
        styles = _styles(panels)
        for letter, panel in zip(letters, panels, strict=True):
            _DRAWN[type(panel)](axes[letter], panel, styles)
        figure.savefig(file, dpi=120)
        plt.close(figure)
    return file


def draw_comparison(
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], masses: Mapping[str, RankMass], file: Path
) -> None:
    """Validation curves, one panel per measure, and the probability mass by teacher rank.

    Args:
        curves: measure -> student -> (step, value) pairs.
        masses: student -> its mass by the teacher's rank; the teacher's own bars are those of the first.
        file: a PNG.
    """
    panels: list[Panel] = []
    for measure, students in curves.items():
        drawn = tuple(Curve(name, *zip(*points, strict=True)) for name, points in students.items())
        panels.append(Curves(f"{measure} on validation", "optimiser step", "nats per token", drawn))
    draw([*panels, rank_mass_bars(masses)], file)


def _draw_curves(axis: plt.Axes, panel: Curves, styles: Mapping[str, Style]) -> None:
    if panel.behind is not None:
        axis.bar(panel.behind.x, panel.behind.y, width=1.0, color="#bbbbbb", label=panel.behind.label)
    for curve in panel.curves:
        colour, marker, line = styles[curve.label]
        look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4.5}
        look |= {"label": curve.label, "linewidth": 1.5, "markevery": max(1, len(curve.x) // 12)}
        if curve.spread is None:
            axis.plot(curve.x, curve.y, **look)
        else:
            axis.errorbar(curve.x, curve.y, yerr=curve.spread, capsize=3, **look)
    axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    axis.set(xscale="log" if panel.log_x else "linear", yscale="log" if panel.log_y else "linear")
    if panel.y_range is not None:
        axis.set_ylim(*panel.y_range)
    axis.grid(alpha=0.3)
    axis.legend(**(BESIDE if _is_wordy(panel) else {}))


def _draw_bars(axis: plt.Axes, panel: Bars, styles: Mapping[str, Style]) -> None:
    width = 0.84 / len(panel.bars)
    for index, (name, values) in enumerate(panel.bars.items()):
        positions = [bucket - 0.42 + width * (index + 0.5) for bucket in range(len(values))]
        hatch = HATCHES[index % len(HATCHES)]
        look: dict[str, Any] = {"color": styles[name][0], "edgecolor": "white", "linewidth": 0.3, "hatch": hatch}
        axis.bar(positions, values, width, label=name, **look)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xticks(range(len(panel.labels)), panel.labels, rotation=30, ha="right", rotation_mode="anchor")
    axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    if _is_wordy(panel):
        axis.legend(**BESIDE)
    else:
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.25 * (high - low))  # room for the legend
        axis.legend(loc="upper center", ncols=2)


def _draw_surface(axis: plt.Axes, panel: Surface, styles: Mapping[str, Style]) -> None:
    alphas, betas, values, _ = zip(*panel.points, strict=True)
    if _span_a_plane(alphas, betas):
        axis.tricontourf(alphas, betas, values, levels=14, cmap="cividis", alpha=0.85)
    shown = axis.scatter(alphas, betas, c=values, cmap="cividis", edgecolors="black", linewidths=0.7, s=46, zorder=3)
    axis.figure.colorbar(shown, ax=axis, label=panel.value_label)
    for name, divergence in (("forward KL", divergences.FORWARD_KL), ("reverse KL", divergences.REVERSE_KL)):
        colour, marker, _ = STYLES[name]
        place = (divergence.alpha, divergence.beta)
        axis.plot(*place, marker, markersize=13, markerfacecolor="none", color=colour, label=name, zorder=2)
    axis.axline((0, 1), (1, 0), color="black", linewidth=0.9, linestyle="--", label="α + β = 1")
    if panel.best is not None:
        label = f"best: ({panel.best.alpha:g}, {panel.best.beta:g}), {panel.best.value:.4g}"
        place = (panel.best.alpha, panel.best.beta)
        axis.plot(*place, "*", markersize=15, color="white", markeredgecolor="black", label=label, zorder=4)
    low, high = min(*alphas, *betas, 0.0) - 0.08, max(*alphas, *betas, 1.0) + 0.08
    axis.set(title=panel.title, xlabel="α (hardness)", ylabel="β (confidence)", xlim=(low, high), ylim=(low, high))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, markerscale=0.6, frameon=False)


def _draw_plane(axis: plt.Axes, panel: Plane, styles: Mapping[str, Style]) -> None:
    low, high = -1.4, 2.6
    axis.axhspan(0, 1, -low / (high - low), (1 - low) / (high - low), color="#eeeeee", zorder=0)
    axis.text(0.5, 0.04, "useful range", ha="center", fontsize=8, color="#777777")
    for one, other in (((0, 0), (1, 0)), ((0, 0), (0, 1)), ((0, 0), (1, -1))):
        axis.axline(one, other, color="#bbbbbb", linewidth=0.8, linestyle=":")
    axis.text(high - 0.05, -0.13, "limit lines: α, β or α + β = 0", ha="right", fontsize=7, color="#777777")
    axis.axline((0, 1), (1, 0), color="#0072B2", linewidth=1, label="α-divergences, α + β = 1")
    axis.axline((1, 0), (1, 1), color="#009E73", linewidth=1, linestyle="--", label="β-divergences, α = 1")
    for name, (divergence, offset) in NAMED.items():
        paper = divergence in (divergences.LLM, divergences.CIFAR)
        marker, colour, size = ("*", "#D55E00", 9) if paper else ("o", "black", 5)
        axis.plot(divergence.alpha, divergence.beta, marker, color=colour, markersize=size)
        axis.annotate(name, (divergence.alpha, divergence.beta), offset, textcoords="offset points", fontsize=8)
    few = len(panel.runs) <= len(OTHER_STYLES)
    for index, (name, alpha, beta) in enumerate(panel.runs):
        colour, marker, _ = styles[name] if few else OTHER_STYLES[0]
        label = name if few else f"{len(panel.runs)} runs" if index == 0 else None
        look: dict[str, Any] = {"markersize": 12, "markerfacecolor": "none", "markeredgewidth": 1.5, "linestyle": ""}
        axis.plot(alpha, beta, marker, color=colour, label=label, **look)
    arrow = {"arrowstyle": "->", "color": "#D55E00"}
    axis.annotate("", (-1.2, -1.25), (0.9, -1.25), arrowprops=arrow)
    axis.text(-0.15, -1.2, "large errors are chased harder", ha="center", fontsize=8, color="#D55E00")
    axis.annotate("", (-1.25, 1.4), (-1.25, -0.9), arrowprops=arrow)
    axis.text(
        -1.2, 0.2, "the student's confidence\ncounts for more", fontsize=8, color="#D55E00", rotation=90, va="center"
    )
    axis.set(xlabel="α (hardness)", ylabel="β (confidence)", xlim=(low, high), ylim=(low, high), aspect="equal")
    axis.legend(frameon=False, fontsize=8, loc="upper right")


_DRAWN: dict[type, Callable[[plt.Axes, Any, Mapping[str, Style]], None]] = {
    Curves: _draw_curves,
    Bars: _draw_bars,
    Surface: _draw_surface,
    Plane: _draw_plane,
}


def _styles(panels: Sequence[Panel]) -> dict[str, Style]:
    """Label -> its style in all panels of a figure; in one panel no two are alike, as far as there are styles."""
    styles: dict[str, Style] = {}
    for panel in panels:
        labels = _labels(panel)
        for index, label in enumerate(labels):
            if label not in styles:
                taken = [styles[other] for other in labels if other in styles]
                named = [style for name, style in STYLES.items() if label.startswith(name)]
                free = [style for style in (*named, *OTHER_STYLES) if style not in taken]
                styles[label] = (free or OTHER_STYLES)[0 if free else index % len(OTHER_STYLES)]
    return styles


def _is_wordy(panel: Panel) -> bool:
    """Whether its legend would cover what it explains."""
    labels = _labels(panel) if isinstance(panel, (Curves, Bars)) else []
    return len(labels) > 6 or any(len(label) > 24 for label in labels)


def _labels(panel: Panel) -> list[str]:
    match panel:
        case Curves():
            return [curve.label for curve in panel.curves]
        case Bars():
            return list(panel.bars)
        case Plane():
            return [name for name, _, _ in panel.runs]
        case _:
            return []


def _span_a_plane(alphas: Sequence[float], betas: Sequence[float]) -> bool:
    """Whether a triangle of the points has an area."""
    a, b = alphas[0], betas[0]
    edges = [(x - a, y - b) for x, y in zip(alphas, betas, strict=True)]
    return any(abs(x1 * y2 - x2 * y1) > 1e-9 for x1, y1 in edges for x2, y2 in edges)
