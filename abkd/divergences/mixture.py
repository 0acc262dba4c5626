"""Divergences from a mixture m = mix * teacher + (1 - mix) * student: mix is the teacher's share, always.

p is the teacher, q the student. Everything follows from KL(a || m), m = share a + (1 - share) b, in the form

    sum_k a phi(t),   t = ln m - ln a,   phi(t) = e^t - 1 - t >= 0                             (5)

which equals sum a ln(a/m) for normalised rows and does not cancel. Its gradients are

    d/d ln b = (1 - share) b (1 - a/m),   d/d ln a = a (ln(a/m) + share (1 - a/m)).            (6)
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from abkd import ranges
from abkd.divergences.alpha_beta import alpha_beta
from abkd.divergences.rows import matching_rows

_SERIES_RANGE = 1.0


def jsd(*, student: Tensor, teacher: Tensor, mix: float = 0.5) -> Tensor:
    """mix * KL(p || m) + (1 - mix) * KL(q || m), m = mix p + (1 - mix) q; symmetric for mix = 0.5.

    Shapes as in `alpha_beta`; finite everywhere, at most ln 2 for mix = 0.5.

    Args:
        mix: the teacher's share of the mixture, 0 < mix < 1; the beta of GKD and TRL.

    Source: Lin, "Divergence measures based on the Shannon entropy", 1991; as a distillation loss: Agarwal et al.,
        "On-policy distillation" (GKD), ICLR 2024, Eq. 1. The reference code of ABKD computes mix = 0.9
        under the name of the symmetric one.
    """
    ranges.check("jsd", mix=mix)
    student, teacher = matching_rows(student, teacher)
    forward = _kl_to_mixture(teacher, student, mix)
    reverse = _kl_to_mixture(student, teacher, 1 - mix)
    return mix * forward + (1 - mix) * reverse


def skewed_forward_kl(*, student: Tensor, teacher: Tensor, mix: float = 0.1) -> Tensor:
    """KL(p || m), m = mix p + (1 - mix) q. Shapes as in `alpha_beta`; finite everywhere, at most -ln mix.

    Args:
        mix: the teacher's share of the mixture, 0 < mix < 1; the lambda of DistiLLM.

    Source: Ko et al., "DistiLLM", ICML 2024, Eq. 3 (SKL, lambda 0.1); the skew divergence: Lee, 1999. The
        reference codes leave the teacher's entropy out.
    """
    ranges.check("skewed_forward_kl", mix=mix)
    student, teacher = matching_rows(student, teacher)
    return _kl_to_mixture(teacher, student, mix)


def skewed_reverse_kl(*, student: Tensor, teacher: Tensor, mix: float = 0.9) -> Tensor:
    """KL(q || m), m = mix p + (1 - mix) q. Shapes as in `alpha_beta`; finite everywhere, at most -ln(1 - mix).

    Args:
        mix: the teacher's share of the mixture, 0 < mix < 1; 1 - lambda of DistiLLM.

    Source: Ko et al., "DistiLLM", ICML 2024 (SRKL, lambda 0.1).
    """
    ranges.check("skewed_reverse_kl", mix=mix)
    student, teacher = matching_rows(student, teacher)
    return _kl_to_mixture(student, teacher, 1 - mix)


def alpha_mixture(
    *,
    student: Tensor,
    teacher: Tensor,
    alpha: float | Tensor = 0.2,
    beta: float | Tensor = 0.7,
    mix: float = 0.1,
    order: float = -1.0,
) -> Tensor:
    """`alpha_beta` of the teacher from r ~ (mix p^k + (1 - mix) q^k)^(1/k), k = (1 - order)/2, r normalised.

    Shapes as in `alpha_beta`.

    Args:
        alpha, beta: as in `alpha_beta`.
        mix: the teacher's share of the mixture, 0 < mix < 1; the lambda of AMiD.
        order: the alpha of AMiD, any finite real: -1 is the arithmetic mixture, 1 the geometric one, 3 the harmonic.

    Edges:
        A class at -inf in both rows adds nothing; for order >= 1 a class at -inf in one row is at -inf in r.
        The gradient passes through r, by autograd, and is never NaN; at the edges of `alpha_beta` as there.

    Source: Shin et al., "AMiD: knowledge distillation for LLMs with alpha-mixture assistant distribution", ICLR 2026.
    """
    ranges.check("alpha_mixture", mix=mix, order=order)
    k = (1 - order) / 2
    student, teacher = matching_rows(student, teacher)
    student_zero, teacher_zero = student.isneginf(), teacher.isneginf()
    neither = ~student_zero & ~teacher_zero
    q, p = student.masked_fill(~neither, 0.0), teacher.masked_fill(~neither, 0.0)
    u = p - q
    mixed = q + (mix * u if k == 0 else _log_mixture(k * u, mix) / k)
    if k > 0:
        mixed = torch.where(student_zero & ~teacher_zero, teacher + math.log(mix) / k, mixed)
        mixed = torch.where(teacher_zero & ~student_zero, student + math.log1p(-mix) / k, mixed)
        neither = ~(student_zero & teacher_zero)
    mixed = mixed.masked_fill(~neither, -math.inf)
    nothing = mixed.isneginf().all(-1, keepdim=True)  # disjoint rows with order >= 1: r has no mass to normalise
    log_p, log_q = (row.logsumexp(-1, keepdim=True) for row in (teacher, student))
    log_r = torch.where(nothing, 0.0, mixed.masked_fill(nothing, 0.0).logsumexp(-1, keepdim=True))
    mixed = mixed - (log_r - (log_q + mix * (log_p - log_q)))  # ln 1 of p and q, rounded as r's is: exact at p = q
    return alpha_beta(student=mixed, teacher=teacher, alpha=alpha, beta=beta)


def _kl_to_mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """KL(a || share a + (1 - share) b) of log-probabilities ln a = `first`, ln b = `second`."""
    return _KLToMixture.apply(first, second, share)


class _KLToMixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first: Tensor, second: Tensor, share: float) -> Tensor:
        ctx.save_for_backward(first, second)
        ctx.share = share
        t = _log_mixture(second - first, 1 - share)
        near = t.abs() <= _SERIES_RANGE
        far = (first + t).exp() - first.exp() * (1 + t)  # (5)
        value = torch.where(near, first.exp() * _phi_series(t.clamp(-_SERIES_RANGE, _SERIES_RANGE)), far)
        value = torch.where(first.isneginf(), (1 - share) * second.exp(), value)
        return value.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        first, second = ctx.saved_tensors
        share, grad = ctx.share, grad.unsqueeze(-1)
        first_zero = first.isneginf()
        t = _log_mixture(second - first, 1 - share).masked_fill_(first_zero, math.inf)  # a/m = e^-t is 0 there
        excess = -torch.expm1(-t)
        second_grad = (1 - share) * second.exp() * excess * grad if ctx.needs_input_grad[1] else None
        first_grad = None
        if ctx.needs_input_grad[0]:
            first_grad = (first.exp() * (share * excess - t)).masked_fill_(first_zero, 0.0) * grad
        return first_grad, second_grad, None


def _log_mixture(x: Tensor, share: float) -> Tensor:
    """ln(share e^x + 1 - share), without cancellation for small x nor overflow for large; differentiable."""
    small, large = x.clamp(max=1.0), x.clamp(min=1.0)
    return torch.where(
        x > 1.0, large + torch.log1p((1 - share) * torch.expm1(-large)), torch.log1p(share * torch.expm1(small))
    )


def _phi_series(t: Tensor) -> Tensor:
    """e^t - 1 - t = t^2 sum_n t^n / (n + 2)! for |t| <= 1."""
    num_terms = 10 if t.dtype == torch.float32 else 18
    total = torch.full_like(t, 1 / math.factorial(num_terms + 1))
    for n in reversed(range(num_terms - 1)):
        total.mul_(t).add_(1 / math.factorial(n + 2))
    return total.mul_(t).mul_(t)
