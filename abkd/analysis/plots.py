"""Drawings of numbers that other modules computed. The only file that imports matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from abkd.analysis.mass import RankMass

COLOURS = {
    "forward KL": "#0072B2",
    "reverse KL": "#D55E00",
    "alpha-beta": "#009E73",
    "teacher": "#000000",
    "before": "#999999",
}
"""Okabe and Ito's palette: told apart with any kind of colour vision; curves by their markers too."""
MARKERS = {"forward KL": "o", "reverse KL": "s", "alpha-beta": "^", "before": "x"}


def draw_comparison(
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], masses: Mapping[str, RankMass], file: Path
) -> None:
    """Validation curves, one panel per measure, and the probability mass by teacher rank.

    Args:
        curves: measure -> student -> (step, value) pairs.
        masses: student -> its mass by the teacher's rank; the teacher's own bars are those of the first.
        file: a PNG.
    """
    figure, axes = plt.subplots(1, len(curves) + 1, figsize=(4.2 * (len(curves) + 1), 3.8), layout="constrained")
    for axis, (measure, students) in zip(axes, curves.items(), strict=False):
        for name, points in students.items():
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, label=name, color=COLOURS.get(name), marker=MARKERS.get(name), markersize=4)
        axis.set(title=f"{measure} on validation", xlabel="optimiser step", ylabel="nats per token")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    _draw_masses(axes[-1], masses)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _draw_masses(axis: plt.Axes, masses: Mapping[str, RankMass]) -> None:
    first = next(iter(masses.values()))
    rows = {"teacher": first.teacher} | {name: mass.student for name, mass in masses.items()}
    width = 0.8 / len(rows)
    for index, (name, values) in enumerate(rows.items()):
        positions = [bucket - 0.4 + width * (index + 0.5) for bucket in range(len(values))]
        axis.bar(positions, values, width, label=name, color=COLOURS.get(name), edgecolor="white", linewidth=0.4)
    axis.set_xticks(range(len(first.labels)), first.labels, fontsize=8, rotation=30)
    axis.set(title="probability mass by teacher rank", xlabel="rank of the token to the teacher", ylabel="mean mass")
    axis.legend(fontsize=8)
