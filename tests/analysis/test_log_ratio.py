"""The log mass ratio and its factors, against 60-digit arithmetic and finite differences."""

import math

import mpmath
import pytest
import torch

from abkd import InputError
from abkd.analysis.log_ratio import confidence, hardness, log_ratio, logit_gradient, measured_log_ratio, normaliser
from abkd.calibrations import DIST, DKD, Plain
from abkd.divergences import KINDS, AlphaBeta, alpha_beta

POINTS = [(1, 0), (0, 1), (0.2, 0.7), (0.8, 0.3), (0, 0), (1e-9, 0.5), (2, -1), (-1, 2), (0.5, -0.5)]


def rows(num_rows=3, vocab=7, scale=2.0):
    return scale * torch.randn(num_rows, vocab, dtype=torch.float64)


@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_is_that_of_finite_differences(name):
    torch.manual_seed(0)
    divergence, student, teacher = KINDS[name](), rows(2, 6), rows(2, 6)
    gradient = logit_gradient(divergence, student=student, teacher=teacher)

    def value(logits):
        return divergence(student=logits.log_softmax(-1), teacher=teacher.log_softmax(-1)).sum().item()

    if name in ("akl", "bdkd"):  # their weights are constants to the gradient
        assert gradient.sum(-1).abs().max() < 1e-12
        return
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(6)).tolist():
        nudge = torch.zeros_like(student)
        nudge[tuple(index)] = 1e-5
        slope = (value(student + nudge) - value(student - nudge)) / 2e-5
        assert gradient[tuple(index)].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_a_calibration_has_a_gradient_too():
    student, teacher, labels = rows(4), rows(4), torch.tensor([0, 3, 6, 1])
    at_4 = logit_gradient(Plain(AlphaBeta(), temperature=4.0), student=student, teacher=teacher)
    inside = logit_gradient(AlphaBeta(), student=student / 4, teacher=teacher / 4)
    torch.testing.assert_close(at_4, inside / 4)
    for calibration in (DKD(), DIST()):
        assert logit_gradient(calibration, student=student, teacher=teacher, labels=labels).abs().sum() > 0


def test_it_gives_a_gradient_where_none_is_recorded():
    with torch.no_grad():
        gradient = logit_gradient(AlphaBeta(), student=rows().half().requires_grad_(), teacher=rows())
    assert gradient.dtype == torch.float64 and gradient.abs().sum() > 0 and not gradient.requires_grad


@pytest.mark.parametrize("step_size", [1e-9, 1e-3, 1.0, 300.0])
@pytest.mark.parametrize("alpha, beta", POINTS)
def test_log_ratio_is_that_of_a_step_in_60_digits(alpha, beta, step_size):
    torch.manual_seed(1)
    student, teacher = rows(1), rows(1)
    log_q = student.log_softmax(-1)
    found = log_ratio(log_q, logit_gradient(AlphaBeta(alpha, beta), student=student, teacher=teacher), step_size)
    with mpmath.workdps(60):
        z, t = ([mpmath.exp(mpmath.mpf(x)) for x in logits[0].tolist()] for logits in (student, teacher))
        q, p = [x / sum(z) for x in z], [x / sum(t) for x in t]
        a, b, eta = mpmath.mpf(alpha), mpmath.mpf(beta), mpmath.mpf(step_size)
        error = [mpmath.log(x / y) if a == 0 else (x**a - y**a) / a for x, y in zip(p, q, strict=True)]
        w = [y**b * e for y, e in zip(q, error, strict=True)]
        stepped = [x * mpmath.exp(eta * (each - y * sum(w))) for x, y, each in zip(z, q, w, strict=True)]
        truth = [float(mpmath.log(x / sum(stepped) / y)) for x, y in zip(stepped, q, strict=True)]
    assert found[0].tolist() == pytest.approx(truth, rel=1e-9, abs=3e-15)


def test_log_ratio_is_exact_plus_a_term_that_all_classes_share():
    student = rows().log_softmax(-1)
    gradient = logit_gradient(AlphaBeta(), student=student, teacher=rows())
    shared = log_ratio(student, gradient, 0.7) + 0.7 * gradient
    torch.testing.assert_close(shared, normaliser(student, gradient, 0.7).expand_as(shared))
    after = student + log_ratio(student, gradient, 0.7)
    torch.testing.assert_close(after.logsumexp(-1), torch.zeros(3, dtype=torch.float64), atol=1e-14, rtol=0)


def test_a_measured_ratio_is_that_of_the_step_taken():
    student = rows().requires_grad_()
    teacher = rows()
    before = student.detach().log_softmax(-1)
    optimizer = torch.optim.SGD([student], lr=0.3)
    alpha_beta(student=student.log_softmax(-1), teacher=teacher.log_softmax(-1), alpha=0.2, beta=0.7).sum().backward()
    optimizer.step()
    measured = measured_log_ratio(before, student.detach().log_softmax(-1))
    exact = log_ratio(before, logit_gradient(AlphaBeta(0.2, 0.7), student=before, teacher=teacher), 0.3)
    torch.testing.assert_close(measured, exact)


def test_a_padded_class_moves_nothing():
    student, teacher = rows(), rows()
    student[:, -2:] = teacher[:, -2:] = -math.inf
    log_q = student.log_softmax(-1)
    gradient = logit_gradient(AlphaBeta(), student=student, teacher=teacher)
    assert (gradient[:, -2:] == 0).all()
    ratio = log_ratio(log_q, gradient, 1.0)
    assert ratio.isfinite().all()
    assert (measured_log_ratio(log_q, log_q + ratio)[:, -2:] == 0).all()
    without = logit_gradient(AlphaBeta(), student=student[:, :-2], teacher=teacher[:, :-2])
    torch.testing.assert_close(ratio[:, :-2], log_ratio(log_q[:, :-2], without, 1.0))


@pytest.mark.parametrize("alpha, beta", POINTS)
def test_the_factors_make_the_weight_of_the_gradient(alpha, beta):
    student, teacher = rows().log_softmax(-1), rows().log_softmax(-1)
    log_q = student.clone().requires_grad_()
    alpha_beta(student=log_q, teacher=teacher, alpha=alpha, beta=beta).sum().backward()
    weight = confidence(student=student, beta=beta) * hardness(student=student, teacher=teacher, alpha=alpha)
    torch.testing.assert_close(weight * (teacher - student).sign(), -log_q.grad)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 1e-7, 0.0, -0.5, -3.0])
def test_hardness_equals_its_definition(alpha):
    student, teacher = rows(1, 9).log_softmax(-1), rows(1, 9).log_softmax(-1)
    found = hardness(student=student, teacher=teacher, alpha=alpha)
    with mpmath.workdps(40):
        pairs = [(mpmath.exp(q), mpmath.exp(p)) for q, p in zip(student[0].tolist(), teacher[0].tolist(), strict=True)]
        truth = [
            float(abs(mpmath.log(p / q) if alpha == 0 else (p ** mpmath.mpf(alpha) - q ** mpmath.mpf(alpha)) / alpha))
            for q, p in pairs
        ]
    assert found[0].tolist() == pytest.approx(truth, rel=1e-12)


def test_factors_at_probability_zero():
    zero, half = -math.inf, math.log(0.5)
    student, teacher = torch.tensor([[zero, half, zero, half]]), torch.tensor([[half, zero, zero, half]])
    for alpha, expected in ((1.0, 0.5), (0.5, 2 * math.sqrt(0.5)), (0.0, math.inf), (-1.0, math.inf)):
        found = hardness(student=student, teacher=teacher, alpha=alpha)[0].tolist()
        assert found == pytest.approx([expected, expected, 0.0, 0.0])
    assert confidence(student=student, beta=0.0)[0].tolist() == [1, 1, 1, 1]
    assert confidence(student=student, beta=2.0)[0].tolist() == pytest.approx([0, 0.25, 0, 0.25])
    assert confidence(student=student, beta=-1.0)[0].tolist() == pytest.approx([math.inf, 2, math.inf, 2])


def test_a_wrong_argument_is_named():
    student = rows()
    with pytest.raises(InputError, match=r"step_size must be above 0, got 0\.0"):
        log_ratio(student, student, 0.0)
    with pytest.raises(InputError, match="one shape"):
        log_ratio(student, student[:, :-1], 1.0)
    with pytest.raises(InputError, match="alpha must be a finite number"):
        hardness(student=student, teacher=student, alpha=math.nan)
    with pytest.raises(InputError, match="beta must be a finite number"):
        confidence(student=student, beta=math.inf)
