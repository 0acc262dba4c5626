"""Landings against what is known of them, and against scipy's minimiser on a divergence written with numpy."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax

from abkd.explore.landing import land, overlap, width
from abkd.explore.rows import rows_of
from abkd.explore.toys import TOYS

GENERATOR = torch.Generator().manual_seed(3)
OWN = rows_of(
    student_logits=torch.randn(1, 80, generator=GENERATOR),
    teacher_logits=2 * torch.randn(1, 80, generator=GENERATOR),
    names=["own"],
)
ROWS = [*TOYS[:4], *OWN]
POINTS = [(0.2, 0.7), (0.8, 0.3), (0.5, 0.5), (1.0, 1.0), (0.0, 1.0)]


def value(p, log_q, alpha, beta):
    q, s = np.exp(log_q), alpha + beta
    if alpha == 0:
        return (q**beta * beta * (log_q - np.log(p)) - q**beta + p**beta).sum() / beta**2
    return -(p**alpha * q**beta - alpha / s * p**s - beta / s * q**s).sum() / (alpha * beta)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_forward_kl_lands_where_the_moments_of_its_knobs_are_the_teachers(row):
    landing = land(row, 1.0, 0.0)
    expected, found = (row.knobs.T @ log_probabilities.exp() for log_probabilities in (row.teacher, landing.student))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("alpha, beta", POINTS)
def test_no_student_of_the_family_nearby_is_better(row, alpha, beta):
    landing = land(row, alpha, beta)
    p, knobs = row.teacher.exp().numpy(), row.knobs.numpy()

    def of_family(knob_values):
        return value(p, log_softmax(landing.student.numpy() + knobs @ knob_values), alpha, beta)

    best = minimize(of_family, np.zeros(knobs.shape[1]), method="BFGS", options={"gtol": 1e-9})
    assert landing.value == pytest.approx(of_family(np.zeros(knobs.shape[1])), rel=1e-9)
    assert landing.value == pytest.approx(best.fun, rel=1e-5)
    at_best = np.exp(log_softmax(landing.student.numpy() + knobs @ best.x))
    np.testing.assert_allclose(landing.student.exp(), at_best, atol=2e-3)
    before = value(p, row.student.numpy(), alpha, beta)
    assert landing.value < before and landing.num_steps > 0


def test_the_student_stays_in_its_family():
    for row in TOYS[:3]:
        log_q = land(row, 0.2, 0.7).student
        curvature = log_q.diff().diff()  # of a bell's logarithm: one number everywhere
        torch.testing.assert_close(curvature, curvature.mean().expand_as(curvature), rtol=1e-6, atol=1e-9)
        assert curvature.mean() < 0
    log_q = land(OWN[0], 0.2, 0.7).student
    ratio = log_q.diff() / OWN[0].student.diff()  # of log-probabilities at two temperatures
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-6, atol=1e-9)


def test_forward_kl_covers_both_modes_and_reverse_kl_takes_the_near_one():
    row = TOYS[1]
    covering, choosing = land(row, 1.0, 0.0), land(row, 0.0, 1.0)
    assert (covering.student.exp() * torch.arange(32)).sum().item() == pytest.approx(15.5, abs=0.01)
    assert (choosing.student.exp() * torch.arange(32)).sum().item() == pytest.approx(23.0, abs=0.05)
    assert covering.width > 25 > 10 > choosing.width


@pytest.mark.parametrize(
    "alpha, beta, lands", [(0.2, 0.7, True), (1.0, 0.0, False), (0.0, 1.0, False), (0.5, -0.5, False)]
)
def test_where_the_divergence_is_infinite_there_is_no_landing(alpha, beta, lands):
    landing = land(TOYS[-1], alpha, beta)
    assert (landing is not None) == lands
    if landing:
        assert landing.student[6].isneginf() and not landing.student.isnan().any()


def test_a_student_that_is_the_teacher_stays():
    logits = torch.randn(1, 20, generator=GENERATOR)
    (row,) = rows_of(student_logits=logits, teacher_logits=logits, names=["same"])
    landing = land(row, 0.2, 0.7)
    assert (landing.value, landing.num_steps) == (0.0, 0) and torch.equal(landing.student, row.student.log_softmax(-1))
    assert landing.overlap == pytest.approx(1)


def test_overlap_and_width():
    row = TOYS[0]
    p, q = row.teacher.exp().numpy(), row.student.exp().numpy()
    assert overlap(row, row.student) == pytest.approx(1 - 0.5 * abs(p - q).sum())
    assert width(torch.full((8,), 1 / 8, dtype=torch.float64).log()) == pytest.approx(8)
    assert width(torch.tensor([0.0, -torch.inf], dtype=torch.float64)) == pytest.approx(1)
