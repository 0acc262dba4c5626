"""What one point of the plane asks of one student: value, gradient, and the two effects, class by class.

Every number is of `abkd.alpha_beta`: the value, and its gradients by autograd.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from abkd.divergences import alpha_beta


@dataclass(frozen=True)
class Effects:
    """All `[classes]` in fp64 but `value`. A step pushes the logits by -gradient = w - q Σ w.

    w = ± hardness * confidence, with the sign of p - q.
    """

    value: float
    """D in nats, `inf` where it is."""
    class_values: Tensor
    """What each class adds to D."""
    gradient: Tensor
    """dD/dz of the student's logits z; a class whose own gradient is infinite adds nothing, as in training."""
    shift: Tensor
    """dq/dη of one step of size η down that gradient: which classes gain mass, which lose it; sums to 0."""
    hardness: Tensor
    """|p^alpha - q^alpha| / alpha, at alpha = 0 |ln p - ln q|."""
    confidence: Tensor
    """q^beta."""


def effects(*, student: Tensor, teacher: Tensor, alpha: float, beta: float) -> Effects:
    """`alpha_beta` and its parts at log-probabilities `[classes]`; all edges are those of `alpha_beta`.

    Source: Wang et al., "ABKD", ICML 2025, Eq. 132 (gradient), Prop. 4.2 (the two effects).
    """
    log_q, q = student.detach().clone().requires_grad_(), student.exp()
    value = alpha_beta(student=log_q, teacher=teacher, alpha=alpha, beta=beta)
    (pull,) = torch.autograd.grad(value, log_q)  # -w
    gradient = pull - q * pull.sum()  # through the softmax
    shift = q * ((q * gradient).sum() - gradient)
    return Effects(
        value.item(),
        alpha_beta(student=student[:, None], teacher=teacher[:, None], alpha=alpha, beta=beta),
        gradient,
        shift,
        hardness(student=student, teacher=teacher, alpha=alpha),
        (beta * student).exp() if beta else torch.ones_like(student),  # 0^0 = 1
    )


def hardness(*, student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """|p^alpha - q^alpha| / alpha, which is |dD/d ln q| at (alpha, 0); `[classes]`, `inf` where it is."""
    log_q = student.detach().clone().requires_grad_()
    value = alpha_beta(student=log_q, teacher=teacher, alpha=alpha, beta=0.0)
    size = torch.autograd.grad(value, log_q)[0].abs()
    # For alpha <= 0 it is at least |ln p - ln q|: a 0 there is an infinite one, which a gradient leaves out.
    return size.masked_fill((size == 0) & (student != teacher), math.inf) if alpha <= 0 else size
