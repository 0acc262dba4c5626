"""The built-in rows: small enough to see through, each with one thing to learn from it."""

import math

import torch
from torch import Tensor

from abkd.explore.rows import Row


def _bell(num_classes: int, mean: float, width: float) -> Tensor:
    """ln q of a bell curve over 0 .. num_classes - 1."""
    classes = torch.arange(num_classes, dtype=torch.float64)
    return (-0.5 * ((classes - mean) / width) ** 2).log_softmax(-1)


def _mixture(num_classes: int, *modes: tuple[float, float, float]) -> Tensor:
    """ln p of a sum of bells, from (share, mean, width)."""
    return torch.stack([math.log(share) + _bell(num_classes, mean, width) for share, mean, width in modes]).logsumexp(0)


def _one_bell(name: str, about: str, teacher: Tensor, mean: float, width: float) -> Row:
    """A student that can be any bell curve: its knobs add a slope and a curvature to ln q."""
    num_classes = len(teacher)
    place = torch.linspace(-1, 1, num_classes, dtype=torch.float64)
    knobs = torch.stack([place, place**2], dim=-1)
    labels = tuple(str(number) for number in range(num_classes))
    return Row(name, about, labels, _bell(num_classes, mean, width), teacher, knobs)


def _long_tail() -> Row:
    rank = torch.arange(1.0, 51, dtype=torch.float64)
    return Row(
        "Long tail",
        "The teacher's 50 classes fade slowly, as words do (Zipf); the student can only fade by one factor a class.",
        tuple(str(int(number)) for number in rank),
        (-rank / 10).log_softmax(-1),
        (-1.5 * rank.log()).log_softmax(-1),
        rank.unsqueeze(-1) / 50,
    )


def _impossible() -> Row:
    row = _one_bell(
        "Impossible classes",
        "The teacher rules out 0, 1 and 11; the student cannot say 6. A probability of 0 makes D infinite at both KLs.",
        _mixture(12, (0.7, 4.0, 1.2), (0.3, 8.0, 1.0)),
        6.5,
        2.5,
    )
    teacher, student = row.teacher.clone(), row.student.clone()
    teacher[[0, 1, 11]] = -math.inf
    student[6] = -math.inf
    return Row(row.name, row.about, row.labels, student.log_softmax(-1), teacher.log_softmax(-1), row.knobs)


TOYS = (
    _one_bell(
        "Three modes, one bell",
        "The teacher has three modes over 40 classes; the student can only be one bell, and starts off to the right.",
        _mixture(40, (0.6, 10.0, 2.0), (0.25, 17.0, 2.5), (0.15, 30.0, 2.0)),
        23.0,
        5.0,
    ),
    _one_bell(
        "Two equal modes",
        "Two modes, equally good, and a student that can only be one bell: cover both, or choose one?",
        _mixture(32, (0.5, 8.0, 1.8), (0.5, 23.0, 1.8)),
        20.0,
        3.0,
    ),
    _one_bell(
        "Peaked teacher, flat student",
        "The teacher is nearly sure of class 6 but knows what is similar; the student, almost flat, knows nothing.",
        _mixture(20, (0.8, 6.0, 0.6), (0.2, 8.0, 3.0)),
        11.0,
        12.0,
    ),
    _long_tail(),
    _impossible(),
)
"""The first is the toy of docs/figures/toy.py."""
