"""A student that cannot fit its teacher, under several divergences: what each does with the mass that it cannot place.

The teacher has three modes over 40 classes. The student is one bell curve (mean and width), fitted by gradient descent
through `alpha_beta`; nothing else differs between the divergences.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from abkd.analysis.log_ratio import confidence, hardness
from abkd.analysis.panels import Curve, Curves
from abkd.divergences import alpha_beta

NUM_CLASSES = 40
NUM_STARTS = 12
POINTS = {
    "forward KL (1, 0)": (1.0, 0.0),
    "reverse KL (0, 1)": (0.0, 1.0),
    "α-divergence (0.5, 0.5)": (0.5, 0.5),
    "α-β (0.2, 0.7)": (0.2, 0.7),
}
MODES = ((0.6, 10.0, 2.0), (0.25, 17.0, 2.5), (0.15, 30.0, 2.0))
"""Of the teacher: weight, mean, width."""
PUSHED = 0.2
"""The teacher's probability of the class in `push_panel`."""


def bell(mean: Tensor | float, width: Tensor | float) -> Tensor:
    """Log-probabilities `[..., NUM_CLASSES]` of softmax(-((class - mean) / width)^2 / 2), for means `[..., 1]`."""
    return (-0.5 * ((torch.arange(NUM_CLASSES, dtype=torch.float64) - mean) / width) ** 2).log_softmax(-1)


def toy_teacher() -> Tensor:
    """Log-probabilities `[NUM_CLASSES]`, the mixture of `MODES`."""
    return torch.stack([weight * bell(mean, width).exp() for weight, mean, width in MODES]).sum(0).log()


def toy_students(points: Mapping[str, tuple[float, float]] = POINTS, num_steps: int = 300) -> dict[str, Tensor]:
    """Name -> log-probabilities of the best of `NUM_STARTS` descents (Adam, rate 0.2) from different means.

    Args:
        points: name -> (alpha, beta).
    """
    alphas, betas = (
        torch.tensor([*points.values()], dtype=torch.float64).unsqueeze(1).expand(-1, NUM_STARTS, 2).unbind(-1)
    )
    teacher = toy_teacher().expand(len(points), NUM_STARTS, NUM_CLASSES)
    means = torch.linspace(2, NUM_CLASSES - 2, NUM_STARTS, dtype=torch.float64).repeat(len(points), 1).unsqueeze(-1)
    log_widths = torch.full_like(means, 1.5)
    parameters = [means.requires_grad_(), log_widths.requires_grad_()]
    optimizer = torch.optim.Adam(parameters, lr=0.2)
    for _ in range(num_steps):
        optimizer.zero_grad()
        students = bell(means, log_widths.exp())
        values = alpha_beta(student=students, teacher=teacher, alpha=alphas, beta=betas)
        values.sum().backward()
        optimizer.step()
    best = values.argmin(-1).tolist()
    return {name: students[index, best[index]].detach() for index, name in enumerate(points)}


def toy_panels(points: Mapping[str, tuple[float, float]] = POINTS) -> tuple[Curves, ...]:
    """Teacher and fitted student, one panel a divergence; `misplaced` in the title is (1/2) sum |p - q|."""
    teacher = toy_teacher().exp()
    classes = tuple(float(k) for k in range(NUM_CLASSES))
    behind = Curve("teacher", classes, tuple(teacher.tolist()))
    panels = []
    for name, student in toy_students(points).items():
        misplaced = (student.exp() - teacher).abs().sum().item() / 2
        curve = Curve(name, classes, tuple(student.exp().tolist()))
        title = f"{name}\n{misplaced:.0%} of the mass misplaced"
        panels.append(Curves(title, "class", "probability", (curve,), behind=behind, y_range=(0.0, 0.14)))
    return tuple(panels)


def push_panel(points: Mapping[str, tuple[float, float]] = POINTS) -> Curves:
    """q^beta |p^alpha - q^alpha| / alpha at p = `PUSHED`, over q."""
    student = torch.logspace(-4, 0, 200, dtype=torch.float64).log()
    teacher = torch.full_like(student, PUSHED).log()
    curves = tuple(
        Curve(name, tuple(student.exp().tolist()), tuple(push.tolist()))
        for name, (alpha, beta) in points.items()
        for push in [confidence(student=student, beta=beta) * hardness(student=student, teacher=teacher, alpha=alpha)]
    )
    title = f"push on a class with p = {PUSHED:g}"
    return Curves(
        title, "q, the student's probability", "|∂D/∂ln q|", curves, log_x=True, log_y=True, y_range=(1e-4, 2)
    )
