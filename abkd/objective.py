"""The objective: mask, temperature, weights and the token count make one scalar. The only place that reduces."""

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from abkd import ranges
from abkd.divergences import AlphaBeta, AlphaBetaSchedule, Divergence
from abkd.errors import InputError

IGNORED_LABEL = -100


class Loss(NamedTuple):
    total: Tensor
    """Scalar, differentiable: kd_weight * scale * kd + ce_weight * ce, each a sum over tokens / num_tokens; scale is
    1 or temperature squared."""
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
        divergence: of one row of log-probabilities from another, nats; or a schedule of them, see `at`.
        kd_weight, ce_weight: >= 0, not both 0. A term of weight 0 is not computed.
        temperature: > 0, divides the logits of both before the divergence; the cross-entropy's stay as they are.
        teacher_temperature: > 0, of the teacher's logits where it is another one.
        temperature_gradient_scale: "none" leaves the divergence as it is (as in the paper); "squared" multiplies
            it by temperature squared, which keeps the size of the gradient as the temperature rises (Hinton et
            al., arXiv 1503.02531). Needs one temperature for both.
    """

    divergence: Divergence | AlphaBetaSchedule = field(default_factory=AlphaBeta)
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: float = 1.0
    teacher_temperature: float | None = None
    temperature_gradient_scale: Literal["none", "squared"] = "none"

    def __post_init__(self):
        for name in ("kd_weight", "ce_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be finite and >= 0, got {getattr(self, name)!r}")
        if self.kd_weight == self.ce_weight == 0:
            raise InputError("kd_weight and ce_weight are both 0: nothing to learn; set one above 0")
        ranges.temperatures(self.temperature, self.teacher_temperature, self.temperature_gradient_scale)

    def at(self, progress: float) -> "Objective":
        """The objective at `progress`, 0 to 1, of the training, its schedule resolved to a divergence."""
        if isinstance(self.divergence, AlphaBetaSchedule):
            return replace(self, divergence=self.divergence.at(progress))
        return self

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
        teacher_temperature = self.temperature if self.teacher_temperature is None else self.teacher_temperature
        scale = self.temperature**2 if self.temperature_gradient_scale == "squared" else 1.0
        kd_sum = ce_sum = student_logits.sum() * 0.0 if len(labels) == 0 else student_logits.new_zeros(())
        if self.kd_weight > 0:
            assert teacher_logits is not None
            if isinstance(self.divergence, AlphaBetaSchedule):
                raise InputError("divergence is a schedule; call objective.at(progress)(...)")
            per_token = self.divergence(
                student=torch.log_softmax(student_logits / self.temperature, dim=-1),
                teacher=torch.log_softmax(teacher_logits.float() / teacher_temperature, dim=-1),
            )
            kd_sum = kd_sum + per_token.sum()
        if self.ce_weight > 0:
            ce_sum = ce_sum + torch.nn.functional.cross_entropy(student_logits, labels, reduction="sum")
        total = (scale * self.kd_weight * kd_sum + self.ce_weight * ce_sum) / max(int(num_tokens), 1)
        return Loss(total, kd_sum.detach(), ce_sum.detach())
