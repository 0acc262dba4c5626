"""The meaning of `linear_divergence`, in plain torch: every logit at once, every gradient by autograd."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from abkd.divergences import Divergence
from abkd.head import LMHead
from abkd.targets import Targets, TopKTargets


class LinearLoss(NamedTuple):
    total: Tensor
    """Scalar, differentiable: sum_n token_weights[n] * D[n] + ce_weights[n] * CE[n]."""
    divergence: Tensor
    """D, `[N]`, detached, nats."""
    entropy: Tensor
    """Of the student at its temperature, `[N]`, detached, nats."""
    cross_entropy: Tensor
    """CE of the labels at temperature 1, `[N]`, detached, nats; zeros without labels."""


@dataclass(frozen=True, eq=False)
class Problem:
    """The checked arguments of `abkd.kernels.linear_loss`, as every path takes them."""

    hidden: Tensor
    head: LMHead
    targets: Targets
    divergence: Divergence
    token_weights: Tensor
    temperature: float
    teacher_temperature: float
    labels: Tensor | None
    ce_weights: Tensor | None


def reference_loss(problem: Problem) -> LinearLoss:
    """All logits, then autograd."""
    logits = problem.head.logits(problem.hidden)
    student = torch.log_softmax(logits / problem.temperature, dim=-1)
    if isinstance(problem.targets, TopKTargets):
        values = problem.targets.compare(logits / problem.temperature, problem.divergence)
    else:
        teacher = torch.log_softmax(problem.targets.logits(0, len(logits)) / problem.teacher_temperature, dim=-1)
        values = problem.divergence(student=student, teacher=teacher)
    total = (problem.token_weights * values).sum()
    cross_entropy = torch.zeros_like(values)
    if problem.labels is not None and problem.ce_weights is not None:
        cross_entropy = torch.nn.functional.cross_entropy(logits, problem.labels, reduction="none")
        total = total + (problem.ce_weights * cross_entropy).sum()
    return LinearLoss(total, values.detach(), entropy(student.detach()), cross_entropy.detach())


def entropy(log_probabilities: Tensor) -> Tensor:
    """`[N]` of `[N, vocab]`, a class at -inf adding 0."""
    return -(log_probabilities.exp() * log_probabilities.masked_fill(log_probabilities.isneginf(), 0.0)).sum(-1)
