"""Value, gradient and factors against formulas written with numpy, and against steps that are really taken."""

import math

import numpy as np
import pytest
import torch

from abkd import alpha_beta
from abkd.explore.effects import effects, hardness
from abkd.explore.toys import TOYS

POINTS = [(0.2, 0.7), (0.8, 0.3), (1.0, 1.0), (-0.4, 1.3), (1.4, -0.2), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, -0.5)]
POSITIVE = [row for row in TOYS if row.student.isfinite().all() and row.teacher.isfinite().all()]
ZEROS = TOYS[-1]


def class_values(p, q, alpha, beta):
    """Wang et al. 2025, App. B, Eq. 8, branch by branch."""
    if alpha == beta == 0:
        return 0.5 * np.log(p / q) ** 2
    if beta == 0:
        return (p**alpha * np.log(p**alpha / q**alpha) - p**alpha + q**alpha) / alpha**2
    if alpha == 0:
        return (q**beta * np.log(q**beta / p**beta) - q**beta + p**beta) / beta**2
    if alpha == -beta:
        return (np.log(q**alpha / p**alpha) + (q / p) ** -alpha - 1) / alpha**2
    s = alpha + beta
    return -(p**alpha * q**beta - alpha / s * p**s - beta / s * q**s) / (alpha * beta)


@pytest.mark.parametrize("row", POSITIVE, ids=lambda row: row.name)
@pytest.mark.parametrize("alpha, beta", POINTS)
def test_every_number_is_that_of_the_paper(row, alpha, beta):
    found = effects(student=row.student, teacher=row.teacher, alpha=alpha, beta=beta)
    p, q = row.teacher.exp().numpy(), row.student.exp().numpy()
    of_classes = class_values(p, q, alpha, beta)
    np.testing.assert_allclose(found.class_values, of_classes, rtol=1e-8, atol=1e-12)
    assert found.value == pytest.approx(of_classes.sum(), rel=1e-9)
    assert found.value == alpha_beta(student=row.student, teacher=row.teacher, alpha=alpha, beta=beta).item()
    signed = (p**alpha - q**alpha) / alpha if alpha else np.log(p / q)
    np.testing.assert_allclose(found.hardness, abs(signed), rtol=1e-8, atol=1e-13)
    np.testing.assert_allclose(found.confidence, q**beta, rtol=1e-12)
    w = q**beta * signed
    scale = abs(w).max()
    np.testing.assert_allclose(found.gradient, q * w.sum() - w, rtol=1e-8, atol=1e-12 * scale)  # Eq. 132


@pytest.mark.parametrize("row", TOYS, ids=lambda row: row.name)
@pytest.mark.parametrize("alpha, beta", [(0.2, 0.7), (1.0, 0.0), (0.0, 1.0)])
def test_the_shift_is_that_of_a_small_step(row, alpha, beta):
    found = effects(student=row.student, teacher=row.teacher, alpha=alpha, beta=beta)
    after, before = ((row.student - step * found.gradient).softmax(-1) for step in (1e-6, -1e-6))
    torch.testing.assert_close((after - before) / 2e-6, found.shift, rtol=1e-6, atol=1e-9)
    assert found.shift.sum().item() == pytest.approx(0, abs=1e-15)


def test_at_a_zero_the_limits_are_given():
    only_student, only_teacher = ZEROS.teacher.isneginf(), ZEROS.student.isneginf()
    assert (int(only_student.sum()), int(only_teacher.sum())) == (3, 1)
    p, q = ZEROS.teacher.exp(), ZEROS.student.exp()
    inside = effects(student=ZEROS.student, teacher=ZEROS.teacher, alpha=0.2, beta=0.7)
    torch.testing.assert_close(inside.class_values[only_student], q[only_student] ** 0.9 / (0.2 * 0.9))
    torch.testing.assert_close(inside.class_values[only_teacher], p[only_teacher] ** 0.9 / (0.7 * 0.9))
    torch.testing.assert_close(inside.hardness[only_teacher], p[only_teacher] ** 0.2 / 0.2)
    assert inside.confidence[only_teacher].item() == 0 and math.isfinite(inside.value)
    for alpha, beta in ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (-0.5, 0.7), (0.7, -0.5), (0.5, -0.5)):
        found = effects(student=ZEROS.student, teacher=ZEROS.teacher, alpha=alpha, beta=beta)
        assert math.isinf(found.value) and not found.gradient.isnan().any() and not found.shift.isnan().any()
        infinite = (only_student | only_teacher) if alpha <= 0 else torch.zeros(12, dtype=torch.bool)
        assert torch.equal(found.hardness.isinf(), infinite)
        assert found.confidence[only_teacher].item() == (1.0 if beta == 0 else 0.0 if beta > 0 else math.inf)
        assert found.class_values[~only_student & ~only_teacher].isfinite().all()


def test_a_student_that_is_the_teacher_is_left_alone():
    row = TOYS[0].teacher
    for alpha, beta in POINTS:
        found = effects(student=row, teacher=row, alpha=alpha, beta=beta)
        assert found.value == 0 and not found.gradient.any() and not found.shift.any() and not found.hardness.any()


def test_a_small_exponent_loses_no_digits():
    row = TOYS[0]
    near, limit = (hardness(student=row.student, teacher=row.teacher, alpha=alpha) for alpha in (1e-9, 0.0))
    torch.testing.assert_close(near, limit, rtol=1e-6, atol=1e-12)
