"""The toy student against a fit by scipy of the plain formula, in numpy."""

import math
import re

import numpy as np
import pytest
from scipy.optimize import minimize

from abkd.analysis.toy import NUM_CLASSES, POINTS, push_panel, toy_panels, toy_students, toy_teacher

CLASSES = np.arange(NUM_CLASSES)


def bell(mean, width):
    weights = np.exp(-0.5 * ((CLASSES - mean) / width) ** 2)
    return weights / weights.sum()


TEACHER = 0.6 * bell(10, 2) + 0.25 * bell(17, 2.5) + 0.15 * bell(30, 2)


def divergence(q, alpha, beta):
    p, q = TEACHER, np.maximum(q, 1e-300)
    if (alpha, beta) == (1.0, 0.0):
        return (p * np.log(p / q)).sum()
    if (alpha, beta) == (0.0, 1.0):
        return (q * np.log(q / p)).sum()
    s = alpha + beta
    return -(p**alpha * q**beta - alpha / s * p**s - beta / s * q**s).sum() / (alpha * beta)


def test_the_teacher_is_the_mixture():
    assert toy_teacher().exp().tolist() == pytest.approx(TEACHER.tolist())


@pytest.fixture(scope="module")
def students():
    return toy_students()


@pytest.mark.parametrize("name", POINTS)
def test_the_student_is_the_best_bell_curve(name, students):
    point = POINTS[name]
    fits = [
        minimize(
            lambda x: divergence(bell(x[0], math.exp(x[1])), *point),
            [start, 1.5],
            method="Nelder-Mead",
            options={"xatol": 1e-7, "fatol": 1e-12},
        )
        for start in (5, 12, 30)
    ]
    best = min(fits, key=lambda fit: fit.fun)
    expected = bell(best.x[0], math.exp(best.x[1]))
    assert students[name].exp().tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_panels_show_what_was_fitted(students, monkeypatch):
    monkeypatch.setattr("abkd.analysis.toy.toy_students", lambda points: students)
    panels = toy_panels()
    assert len(panels) == len(POINTS)
    for name, panel in zip(POINTS, panels, strict=True):
        (curve,) = panel.curves
        assert (curve.label, curve.y) == (name, tuple(students[name].exp().tolist()))
        assert panel.behind.y == pytest.approx(TEACHER.tolist())
        misplaced = np.abs(np.array(curve.y) - TEACHER).sum() / 2
        assert int(re.search(r"(\d+)% of the mass", panel.title)[1]) == round(100 * misplaced)


def test_the_push_is_the_formula():
    for curve in push_panel().curves:
        alpha, beta = POINTS[curve.label]
        for q, push in list(zip(curve.x, curve.y, strict=True))[::20]:
            error = math.log(0.2 / q) if alpha == 0 else (0.2**alpha - q**alpha) / alpha
            assert push == pytest.approx(q**beta * abs(error), rel=1e-9)
