"""Draws docs/figures/toy.png: one student family, three divergences: where the mass goes, and what pushes it.

    python docs/figures/toy.py

The teacher has two modes over 40 classes. The student can only be one bell curve (two parameters). It is
fitted by gradient descent through abkd.alpha_beta; nothing else differs between the panels. The last panel
is the push on a class of teacher probability 0.2, q^beta |p^alpha - q^alpha| / alpha, read off the gradient.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

from abkd import alpha_beta

CLASSES = torch.arange(40.0)
POINTS = {
    "forward KL (1, 0)": (1.0, 0.0),
    "α-β (0.2, 0.7)": (0.2, 0.7),
    "reverse KL (0, 1)": (0.0, 1.0),
}
COLOURS = ["#0072B2", "#009E73", "#D55E00"]


def bell(mean: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[..., 40]`."""
    return (-0.5 * ((CLASSES - mean) / width) ** 2).log_softmax(-1)


def mixture(*modes: tuple[float, float, float]) -> torch.Tensor:
    """Log-probabilities of a weighted sum of bells, from (weight, mean, width)."""
    return sum(weight * bell(torch.tensor(mean), torch.tensor(width)).exp() for weight, mean, width in modes).log()


TEACHER = mixture((0.6, 10.0, 2.0), (0.25, 17.0, 2.5), (0.15, 30.0, 2.0))


def fit(alpha: float, beta: float) -> torch.Tensor:
    """The student's probabilities: the best of 12 gradient descents from different starts."""
    parameters = torch.stack([torch.linspace(2, 38, 12), torch.full((12,), 1.5)], dim=-1).requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=0.05)  # mean, log width
    for _ in range(2000):
        optimizer.zero_grad()
        student = bell(parameters[:, :1], parameters[:, 1:].exp())
        values = alpha_beta(student=student, teacher=TEACHER.expand_as(student), alpha=alpha, beta=beta)
        values.sum().backward()
        optimizer.step()
    return student[values.argmin()].detach().exp()


def push(alpha: float, beta: float, student: torch.Tensor, teacher: float = 0.2) -> torch.Tensor:
    """|dD / d ln q| of one class at each of the student's probabilities."""
    log_q = student.log().unsqueeze(-1).requires_grad_()
    log_p = torch.full_like(log_q, teacher).log()
    alpha_beta(student=log_q, teacher=log_p.detach(), alpha=alpha, beta=beta).sum().backward()
    return log_q.grad.abs().squeeze(-1)


def main() -> None:
    figure, axes = plt.subplots(1, len(POINTS) + 1, figsize=(13, 2.9), layout="constrained")
    probabilities = torch.logspace(-4, 0, 200)
    for axis, colour, (title, (alpha, beta)) in zip(axes, COLOURS, POINTS.items(), strict=False):
        axis.bar(CLASSES, TEACHER.exp(), width=1.0, color="#bbbbbb", label="teacher")
        axis.plot(CLASSES, fit(alpha, beta), color=colour, marker=".", label="student")
        axis.set(title=title, xlabel="class", ylabel="probability", ylim=(0, 0.2))
        axis.legend(frameon=False)
        axes[-1].plot(probabilities, push(alpha, beta, probabilities), color=colour, label=title)
    axes[-1].set(title="push on a class with p = 0.2", xlabel="student's q", xscale="log", yscale="log", ylim=(1e-4, 2))
    axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
