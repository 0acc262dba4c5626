"""Where a student of a restricted family lands when it descends a divergence from where it stands."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from abkd.divergences import alpha_beta
from abkd.explore.rows import Row

_MAX_STEPS = 100
_MAX_CHANGE = 0.5  # of ln q in one step, rms over q: it follows the slope, and leaps into no other valley
_SIZES = [2.0**-halvings for halvings in range(20)]
_DONE = 1e-8  # relative fall of D in one step


@dataclass(frozen=True)
class Landing:
    student: Tensor
    """Log-probabilities `[classes]`."""
    value: float
    """D there, nats."""
    num_steps: int
    overlap: float
    """Σ min(p, q), 0 to 1."""
    width: float
    """e^entropy: it is as wide as so many equally probable classes."""


@lru_cache(maxsize=512)
def land(row: Row, alpha: float, beta: float) -> Landing | None:
    """The family's student at the end of a descent of D from the one shown; None if D is infinite there.

    θ moves by -G⁻¹ dD/dθ, G = Σ q^s (d ln q/dθ)(d ln q/dθ)ᵀ, s = alpha + beta, which is D's own metric: D is
    ½ dθᵀ G dθ between neighbours. It comes to rest where plain gradient descent does, and its path does not depend on
    how the knobs are scaled. A step is halved until D falls by a quarter of what its slope promises.
    """
    knobs = torch.zeros(row.knobs.shape[1], dtype=torch.float64)
    value, num_steps, fall = _value(row, knobs, alpha, beta), 0, math.inf
    if math.isinf(value):
        return None
    while fall > _DONE * value and num_steps < _MAX_STEPS:
        step, slope = _step(row, knobs, alpha, beta)
        fall = 0.0
        for size in _SIZES:
            after = _value(row, knobs + size * step, alpha, beta)
            if after < value + size * slope / 4:
                knobs, value, num_steps, fall = knobs + size * step, after, num_steps + 1, value - after
                break
    student = row.moved(knobs)
    return Landing(student, value, num_steps, overlap(row, student), width(student))


def overlap(row: Row, student: Tensor) -> float:
    """Σ min(p, q)."""
    return torch.minimum(row.teacher, student).exp().sum().item()


def width(log_probabilities: Tensor) -> float:
    """e^entropy, from 1 to the number of classes."""
    return torch.special.entr(log_probabilities.exp()).sum().exp().item()


def _value(row: Row, knobs: Tensor, alpha: float, beta: float) -> float:
    return alpha_beta(student=row.moved(knobs), teacher=row.teacher, alpha=alpha, beta=beta).item()


def _step(row: Row, knobs: Tensor, alpha: float, beta: float) -> tuple[Tensor, float]:
    """-G⁻¹ dD/dθ, shortened to `_MAX_CHANGE`, and the slope of D along it."""
    at = knobs.clone().requires_grad_()
    log_q = row.moved(at)
    (gradient,) = torch.autograd.grad(alpha_beta(student=log_q, teacher=row.teacher, alpha=alpha, beta=beta), at)
    q = log_q.detach().exp()
    slopes = row.knobs - q @ row.knobs  # d ln q / dθ, [classes, num_knobs]
    powers = ((alpha + beta) * log_q.detach()).exp() if alpha + beta else torch.ones_like(q)
    metric = slopes.T @ (powers[:, None] * slopes)
    step = -torch.linalg.lstsq(metric, gradient[:, None], driver="gelsd").solution[:, 0]
    change = (q @ (slopes @ step).square()).sqrt().item()
    if change > _MAX_CHANGE:
        step = step * (_MAX_CHANGE / change)
    return step, (gradient @ step).item()
