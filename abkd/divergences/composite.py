"""Divergences composed of others: sums, adaptive sums and maxima of KLs, and total variation.

p is the teacher, q the student; weights that adapt to the rows are constants to the gradient.
"""

import torch
from torch import Tensor

from abkd import ranges
from abkd.divergences.alpha_beta import alpha_beta, forward_kl, reverse_kl
from abkd.divergences.rows import matching_rows


def symmetric_kl(*, student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p), Jeffreys' divergence: `wsd` at (1, 1). Shapes and edges as `alpha_beta`.

    Source: Jeffreys, 1946.
    """
    return forward_kl(student=student, teacher=teacher) + reverse_kl(student=student, teacher=teacher)


def wsd(*, student: Tensor, teacher: Tensor, forward_weight: float = 0.5, reverse_weight: float = 0.5) -> Tensor:
    """forward_weight * KL(p || q) + reverse_weight * KL(q || p). Shapes and edges as `alpha_beta`.

    Args:
        forward_weight, reverse_weight: above 0.

    Source: the weighted sum that Wang et al., "ABKD", ICML 2025, compare with (0.5 each in their code).
    """
    ranges.check("wsd", forward_weight=forward_weight, reverse_weight=reverse_weight)
    forward = forward_kl(student=student, teacher=teacher)
    return forward_weight * forward + reverse_weight * reverse_kl(student=student, teacher=teacher)


def total_variation(*, student: Tensor, teacher: Tensor) -> Tensor:
    """(1/2) sum_k |p - q|, between 0 and 1. Shapes as `alpha_beta`; finite everywhere, gradient 0 where p = q.

    Source: as a distillation loss: Wen et al., "f-divergence minimization for sequence-level KD", ACL 2023.
    """
    student, teacher = matching_rows(student, teacher)
    both_zero = student.isneginf() & teacher.isneginf()
    q, p = student.masked_fill(both_zero, 0.0), teacher.masked_fill(both_zero, 0.0)
    gap = -torch.maximum(p, q).exp() * torch.expm1(-(p - q).abs())  # |p - q| without cancellation
    return gap.sum(-1) / 2


def akl(*, student: Tensor, teacher: Tensor, head_mass: float = 0.5) -> Tensor:
    """Adaptive KL: h KL(p || q) + (1 - h) KL(q || p), h the share of sum |p - q| that lies in the teacher's head.

    The head is the smallest set of the teacher's likeliest classes whose mass reaches `head_mass`.
    Shapes and edges as `alpha_beta`; a KL of weight 0 counts as 0 even where it is infinite.

    Args:
        head_mass: 0 < head_mass < 1.

    Source: Wu et al., "Rethinking Kullback-Leibler divergence in knowledge distillation for large language
        models", COLING 2025. The reference code of ABKD takes the classes whose cumulative mass stays within
        0.5, so that its head may fall short of it, and its scripts run another loss under this name.
    """
    ranges.check("akl", head_mass=head_mass)
    student, teacher = matching_rows(student, teacher)
    with torch.no_grad():
        p, q = teacher.double().exp(), student.double().exp()
        descending, order = p.sort(dim=-1, descending=True)
        in_head = descending.cumsum(-1) - descending < head_mass
        gap = (p - q).abs().gather(-1, order)
        total = gap.sum(-1)
        head = (torch.where(in_head, gap, 0.0).sum(-1) / total).masked_fill(total == 0, 0.5)
    forward, reverse = forward_kl(student=student, teacher=teacher), reverse_kl(student=student, teacher=teacher)
    return _weighted(head, forward) + _weighted(1 - head, reverse)


def bdkd(*, student: Tensor, teacher: Tensor, gain: float = 2.0) -> Tensor:
    """KL(p || q) + KL(q || p), the first times `gain` where H(p) > H(q), the second where H(q) > H(p).

    Shapes and edges as `alpha_beta`.

    Args:
        gain: above 1.

    Source: Amara et al., "BD-KD: balancing the divergences for online knowledge distillation", 2022, here with a
        fixed teacher. The reference code of ABKD takes gain 3 under a comment that says 2.
    """
    ranges.check("bdkd", gain=gain)
    student, teacher = matching_rows(student, teacher)
    with torch.no_grad():
        teacher_entropy, student_entropy = (torch.special.entr(x.double().exp()).sum(-1) for x in (teacher, student))
    forward, reverse = forward_kl(student=student, teacher=teacher), reverse_kl(student=student, teacher=teacher)
    forward = torch.where(teacher_entropy > student_entropy, gain * forward, forward)
    return forward + torch.where(student_entropy > teacher_entropy, gain * reverse, reverse)


def alphanet(*, student: Tensor, teacher: Tensor, alpha_low: float = -1.0, alpha_high: float = 1.0) -> Tensor:
    """The larger, row by row, of the alpha-divergences `alpha_beta` at (a, 1 - a) of a = alpha_low and alpha_high.

    Shapes and edges as `alpha_beta`. Where both are equal each gives half of the gradient.

    Args:
        alpha_low, alpha_high: finite, alpha_low < alpha_high.

    Source: Wang et al., "AlphaNet", ICML 2021. Its clipping of the ratio p/q is left out: it exists to bound
        gradients that are exact here. The reference code of ABKD takes the maximum over the whole batch.
    """
    ranges.check("alphanet", alpha_low=alpha_low, alpha_high=alpha_high)
    low = alpha_beta(student=student, teacher=teacher, alpha=alpha_low, beta=1 - alpha_low)
    return torch.maximum(low, alpha_beta(student=student, teacher=teacher, alpha=alpha_high, beta=1 - alpha_high))


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    return torch.where(weight == 0, 0.0, weight.to(value.dtype) * value)
