"""The objective: mask, temperature, weights and the token count make one scalar. The only place that reduces."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from abkd.divergences import AlphaBeta, Divergence
from abkd.errors import InputError

IGNORED_LABEL = -100


class Loss(NamedTuple):
    total: Tensor
    """Scalar, differentiable: kd_weight * kd + ce_weight * ce, each a sum over tokens / num_tokens."""
    kd_sum: Tensor
    """Scalar, detached: the divergence summed over this batch's tokens, nats; 0 where kd_weight is 0."""
    ce_sum: Tensor
    """Scalar, detached: the cross-entropy with the labels, likewise; 0 where ce_weight is 0."""


def completion_mask(labels: Tensor) -> Tensor:
    """bool `[batch, length - 1]` from labels `[batch, length]`: True at (b, t) where token t + 1 counts."""
    return labels[:, 1:] != IGNORED_LABEL


@dataclass(frozen=True)
class Objective:
    """kd_weight * divergence(teacher, student) + ce_weight * cross-entropy, a mean over counted tokens.

    Args:
        divergence: of one row of log-probabilities from another, nats.
        kd_weight, ce_weight: >= 0, not both 0. A term of weight 0 is not computed.
        temperature: > 0, divides the logits of both before the divergence; the cross-entropy's stay as they
            are. The divergence is not multiplied by temperature squared (as in the paper).
    """

    divergence: Divergence = field(default_factory=AlphaBeta)
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: float = 1.0

    def __post_init__(self):
        for name in ("kd_weight", "ce_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be finite and >= 0, got {getattr(self, name)!r}")
        if self.kd_weight == self.ce_weight == 0:
            raise InputError("kd_weight and ce_weight are both 0: nothing to learn; set one above 0")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature must be finite and > 0, got {self.temperature!r}")

    def __call__(
        self, *, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, num_tokens: Tensor | int
    ) -> Loss:
        """The loss of one micro-batch, so scaled that micro-batches and ranks add up to the whole step's mean.

        Args:
            student_logits: `[N, vocab]` at the N counted tokens of this micro-batch.
            teacher_logits: `[N, vocab]`; None only where kd_weight is 0.
            labels: `[N]`, the tokens that follow.
            num_tokens: counted tokens of the whole optimiser step, over accumulation and ranks; at least 1 is used.

        Returns:
            Without a counted token, zeros attached to the graph of `student_logits`.
        """
        student_logits = student_logits.float()
        kd_sum = ce_sum = student_logits.sum() * 0.0 if len(labels) == 0 else student_logits.new_zeros(())
        if self.kd_weight > 0:
            assert teacher_logits is not None
            per_token = self.divergence(
                student=torch.log_softmax(student_logits / self.temperature, dim=-1),
                teacher=torch.log_softmax(teacher_logits.float() / self.temperature, dim=-1),
            )
            kd_sum = kd_sum + per_token.sum()
        if self.ce_weight > 0:
            ce_sum = ce_sum + torch.nn.functional.cross_entropy(student_logits, labels, reduction="sum")
        total = (self.kd_weight * kd_sum + self.ce_weight * ce_sum) / max(int(num_tokens), 1)
        return Loss(total, kd_sum.detach(), ce_sum.detach())
