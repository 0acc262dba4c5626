"""Draws docs/figures/plane.png: where the named divergences lie in the (alpha, beta) plane, and what alpha and beta do.

    python docs/figures/plane.py

The curves on the right are read off the gradient of abkd.alpha_beta on one class, |dD / d ln q| =
q^beta |p^alpha - q^alpha| / alpha: its hardness factor (beta = 0) over the size of the error, and what a beta
makes of it over the student's own probability.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

from abkd import alpha_beta
from abkd import divergences as d

NAMED = [
    (d.FORWARD_KL, "forward KL", (8, -12)),
    (d.REVERSE_KL, "reverse KL", (8, 4)),
    (d.HELLINGER, "Hellinger", (8, 4)),
    (d.EUCLIDEAN, "squared Euclidean", (8, 4)),
    (d.ITAKURA_SAITO, "Itakura-Saito", (8, -4)),
    (d.LOG_EUCLIDEAN, "log-Euclidean", (-8, -14)),
    (d.PEARSON, "Pearson χ²", (8, -4)),
    (d.NEYMAN, "Neyman χ²", (-4, 8)),
    (d.LLM, "(0.2, 0.7)\nlanguage models", (-82, 0)),
    (d.CIFAR, "(0.8, 0.3)\nCIFAR-100", (10, -2)),
]
ENDS = torch.tensor([-1.4, 2.6])
COLOURS = ["#0072B2", "#56B4E9", "#009E73", "#D55E00"]


def draw_plane(axis) -> None:
    axis.axhspan(0, 1, 1.4 / 4, 2.4 / 4, color="#eeeeee", zorder=0)
    axis.text(0.5, 0.04, "useful range", ha="center", fontsize=8, color="#777777")
    for x, y in ((ENDS, 0 * ENDS), (0 * ENDS, ENDS), (ENDS, -ENDS)):
        axis.plot(x, y, color="#bbbbbb", lw=0.8, ls=":")
    axis.text(2.55, -0.13, "limit lines: α, β or α + β = 0", ha="right", fontsize=7, color="#999999")
    axis.plot(ENDS, 1 - ENDS, color="#0072B2", lw=1, label="α-divergences, α + β = 1")
    axis.plot(torch.ones(2), ENDS, color="#009E73", lw=1, label="β-divergences, α = 1")
    for divergence, name, offset in NAMED:
        paper = divergence in (d.LLM, d.CIFAR)
        axis.plot(
            divergence.alpha,
            divergence.beta,
            "*" if paper else "o",
            color="#D55E00" if paper else "k",
            ms=9 - 4 * (not paper),
        )
        axis.annotate(name, (divergence.alpha, divergence.beta), offset, textcoords="offset points", fontsize=8)
    arrow = {"arrowstyle": "->", "color": "#D55E00"}
    axis.annotate("", (-1.2, -1.25), (0.9, -1.25), arrowprops=arrow)
    axis.text(-0.15, -1.2, "large errors are chased harder", ha="center", fontsize=8, color="#D55E00")
    axis.annotate("", (-1.25, 1.4), (-1.25, -0.9), arrowprops=arrow)
    axis.text(
        -1.2, 0.2, "the student's confidence\ncounts for more", fontsize=8, color="#D55E00", rotation=90, va="center"
    )
    axis.set(xlabel="α (hardness)", ylabel="β (confidence)", xlim=ENDS.tolist(), ylim=ENDS.tolist(), aspect="equal")
    axis.legend(frameon=False, fontsize=8, loc="upper right")


def weight(alpha: float, beta: float, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """|dD / d ln q| class by class."""
    log_q = student.log().unsqueeze(-1).requires_grad_()
    alpha_beta(student=log_q, teacher=teacher.log().unsqueeze(-1), alpha=alpha, beta=beta).sum().backward()
    return log_q.grad.abs().squeeze(-1)


def draw_hardness(axis) -> None:
    student = torch.full((200,), 0.01)
    errors = torch.logspace(-3, -0.02, 200)
    for colour, alpha in zip(COLOURS, (1.0, 0.5, 0.2, 0.0), strict=True):
        axis.plot(errors, weight(alpha, 0.0, student, student + errors), color=colour, label=f"α = {alpha:g}")
    axis.set(title="hardness: |p^α − q^α| / α at q = 0.01", xlabel="error p − q", xscale="log", yscale="log")
    axis.legend(frameon=False, fontsize=8)


def draw_confidence(axis) -> None:
    student = torch.logspace(-4, 0, 200)
    teacher = 0.5 * student
    for colour, beta in zip(COLOURS, (0.0, 0.3, 0.7, 1.0), strict=True):
        factor = weight(0.5, beta, student, teacher) / weight(0.5, 0.0, student, teacher)
        axis.plot(student, factor, color=colour, label=f"β = {beta:g}")
    axis.set(title="confidence: q^β", xlabel="the student's q", xscale="log", yscale="log", ylim=(1e-4, 2))
    axis.legend(frameon=False, fontsize=8)


def main() -> None:
    figure, axes = plt.subplot_mosaic("aab;aac", figsize=(10.5, 6.6), layout="constrained")
    draw_plane(axes["a"])
    draw_hardness(axes["b"])
    draw_confidence(axes["c"])
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
