"""The log mass ratio of one gradient step on the logits, LogR(y) = ln q'(y) - ln q(y), and what drives it.

p is the teacher, q the student, q' the student after the step, z its logits, g = dD/dz, and eta the step size:

    LogR(y) = -eta g(y) + N,    N = -ln sum_k q(k) exp(-eta g(k))                                    (1)

For the alpha-beta-divergence -g(y) = w(y) - q(y) sum_k w(k), and w is a sign times two factors,

    |w(k)| = confidence * hardness = q(k)^beta * |p(k)^alpha - q(k)^alpha| / alpha.                  (2)

Everything is computed in fp64. Source: Wang et al., "ABKD", ICML 2025, Eq. 5, Prop. 4.2, App. C.1.
"""

import math

import torch
from torch import Tensor

from abkd import ranges
from abkd.calibrations import Calibration, Plain
from abkd.divergences import Divergence
from abkd.divergences.exp_difference import exp_difference
from abkd.errors import InputError


def logit_gradient(
    divergence: Divergence | Calibration, *, student: Tensor, teacher: Tensor, labels: Tensor | None = None
) -> Tensor:
    """dD/dz of each row by autograd, `[N, vocab]`; it sums to 0 over a row.

    Args:
        divergence: one of `abkd.divergences`, at temperature 1, or a calibration; one that looks at the whole batch
            (`DIST`, `MLKD`) sees these rows.
        student, teacher: logits `[N, vocab]`, or log-probabilities.
        labels: `[N]`, where the calibration needs them.
    """
    calibration = divergence if isinstance(divergence, Calibration) else Plain(divergence)
    with torch.enable_grad():
        logits = student.detach().double().requires_grad_()
        value = calibration(student_logits=logits, teacher_logits=teacher.detach().double(), labels=labels)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
    return gradient


def log_ratio(student: Tensor, gradient: Tensor, step_size: float) -> Tensor:
    """log_softmax(z - step_size * gradient) - log_softmax(z), by (1), `[N, vocab]` in nats.

    Args:
        student: log-probabilities before the step, `[N, vocab]`.
        gradient: dD/dz, same shape, see `logit_gradient`.
        step_size: eta > 0, the learning rate if the logits themselves were the parameters.

    Edges: a class at -inf stays there; its ratio is the limit (1).

    Raises:
        InputError: the shapes differ; step_size is not above 0.

    Source: Wang et al., "ABKD", ICML 2025, Eq. 5 and 11; the idea: Tajwar et al., ICML 2024.
    """
    return normaliser(student, gradient, step_size) - step_size * gradient.double()


def normaliser(student: Tensor, gradient: Tensor, step_size: float) -> Tensor:
    """N of (1), the part of LogR that all classes share, `[N, 1]` in nats. Arguments as of `log_ratio`."""
    if student.shape != gradient.shape:
        raise InputError(f"student {tuple(student.shape)} and gradient {tuple(gradient.shape)} must have one shape")
    if ranges.finite("step_size", step_size) <= 0:
        raise InputError(f"step_size must be above 0, got {step_size!r}")
    return -(student.double() - step_size * gradient.double()).logsumexp(-1, keepdim=True)


def measured_log_ratio(before: Tensor, after: Tensor) -> Tensor:
    """after - before, `[N, vocab]` in nats: LogR of a real step, from log-probabilities on both sides of it.

    Edges: 0 for a class at -inf in both.
    """
    neither = before.isneginf() & after.isneginf()
    return (after.double() - before.double()).masked_fill(neither, 0.0)


def hardness(*, student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """|p^alpha - q^alpha| / alpha, and |ln p - ln q| at alpha = 0, class by class: how much an error counts.

    Args:
        student, teacher: log-probabilities, of one shape.
        alpha: any finite real.

    Edges: `+inf` where one of the two is 0 and alpha <= 0; 0 where both are.

    Source: Wang et al., "ABKD", ICML 2025, Prop. 4.2, terms (b).
    """
    alpha = ranges.finite("alpha", alpha)
    student, teacher = student.double(), teacher.double()
    student_zero, teacher_zero = student.isneginf(), teacher.isneginf()
    larger = torch.maximum(student, teacher)
    q, p = (row.masked_fill(student_zero | teacher_zero, 0.0) for row in (student, teacher))
    value = ((p - q) * exp_difference(alpha * q, alpha * p)).abs()
    at_zero = (alpha * larger).exp() / alpha if alpha > 0 else torch.full_like(value, math.inf)
    value = torch.where(student_zero ^ teacher_zero, at_zero, value)
    return value.masked_fill(student_zero & teacher_zero, 0.0)


def confidence(*, student: Tensor, beta: float) -> Tensor:
    """q^beta, class by class: how much the student's own probability counts; 1 everywhere at beta = 0.

    Source: Wang et al., "ABKD", ICML 2025, Prop. 4.2, terms (a).
    """
    beta = ranges.finite("beta", beta)
    return torch.ones_like(student, dtype=torch.float64) if beta == 0 else (beta * student.double()).exp()
