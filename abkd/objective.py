"""The objective: mask, weights and the token count make one scalar. The only place that reduces."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from abkd import ranges
from abkd.calibrations import Calibration, Plain
from abkd.divergences import AlphaBeta, AlphaBetaSchedule, Divergence
from abkd.errors import InputError
from abkd.head import LMHead
from abkd.kernels import linear_cross_entropy, linear_loss
from abkd.targets import Targets, TopKTargets

IGNORED_LABEL = -100


class Loss(NamedTuple):
    total: Tensor
    """Scalar, differentiable: kd_weight * kd + ce_weight * ce, each a sum over tokens / num_tokens."""
    kd_sum: Tensor
    """Scalar, detached: the calibration's value summed over this batch's tokens; 0 where kd_weight is 0."""
    ce_sum: Tensor
    """Scalar, detached: the cross-entropy with the labels, likewise; 0 where ce_weight is 0."""


def completion_mask(labels: Tensor) -> Tensor:
    """bool `[batch, length - 1]` from labels `[batch, length]`: True at (b, t) where token t + 1 counts."""
    return labels[:, 1:] != IGNORED_LABEL


@dataclass(frozen=True)
class Objective:
    """kd_weight * calibration(teacher, student) + ce_weight * cross-entropy, a mean over counted tokens or images.

    Args:
        calibration: how the logits are compared, see `abkd.calibrations`; a bare divergence, or a schedule of
            them, stands for `Plain` of it: at temperature 1. The default is `AlphaBeta()`.
        kd_weight, ce_weight: >= 0, not both 0. A term of weight 0 is not computed.
        kd_warmup: 0 to 1, the share of the training over which kd_weight rises linearly from 0 to its value.
            Needs ce_weight above 0.
    """

    calibration: Calibration | Divergence | AlphaBetaSchedule = field(default_factory=AlphaBeta)
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    kd_warmup: float = 0.0

    def __post_init__(self):
        if not isinstance(self.calibration, Calibration):
            object.__setattr__(self, "calibration", Plain(self.calibration))
        ranges.loss_weights(self.kd_weight, self.ce_weight)
        ranges.warmup(self.kd_warmup, self.kd_weight, self.ce_weight)

    @property
    def divergence(self) -> Divergence | AlphaBetaSchedule | None:
        """The one inside the calibration; None where there is none."""
        return getattr(self.calibration, "divergence", None)

    def at(self, progress: float) -> "Objective":
        """The objective at `progress`, 0 to 1, of the training: its schedule a divergence, its kd_weight as warm as
        it is then."""
        if not 0 <= progress <= 1:
            raise InputError(f"progress must lie between 0 and 1, got {progress!r}")
        warmth = 1.0 if progress >= self.kd_warmup else progress / self.kd_warmup
        return replace(
            self, calibration=self.calibration.at(progress), kd_weight=warmth * self.kd_weight, kd_warmup=0.0
        )

    def __call__(
        self,
        *,
        student_logits: Tensor,
        teacher_logits: Tensor | TopKTargets | None,
        labels: Tensor,
        num_tokens: Tensor | int,
    ) -> Loss:
        """The loss of one micro-batch, so scaled that micro-batches and ranks add up to the whole step's mean.

        Args:
            student_logits: `[N, vocab]` at the N counted tokens of this micro-batch; computed in fp32.
            teacher_logits: `[N, vocab]`, or for a plain calibration `TopKTargets`; None only where kd_weight is 0.
            labels: `[N]`, the tokens that follow.
            num_tokens: counted tokens of the whole optimiser step, over accumulation and ranks; at least 1 is used.

        Returns:
            Without a counted token, zeros attached to the graph of `student_logits`.
        """
        if labels.shape != student_logits.shape[:1]:
            raise InputError(f"labels must be [N] = [{len(student_logits)}], got {tuple(labels.shape)}")
        if self.kd_weight > 0 and teacher_logits is None:
            raise InputError("teacher_logits is None, and kd_weight is above 0; give them, or set kd_weight=0")
        student_logits = student_logits.float()
        kd_sum = ce_sum = student_logits.sum() * 0.0 if len(labels) == 0 else student_logits.new_zeros(())
        if self.kd_weight > 0:
            assert isinstance(self.calibration, Calibration) and teacher_logits is not None
            if isinstance(teacher_logits, TopKTargets):
                per_token = self._top_k(student_logits, teacher_logits)
            else:
                per_token = self.calibration(
                    student_logits=student_logits, teacher_logits=teacher_logits.float(), labels=labels
                )
            kd_sum = kd_sum + per_token.sum()
        if self.ce_weight > 0:
            ce_sum = ce_sum + torch.nn.functional.cross_entropy(student_logits, labels, reduction="sum")
        total = (self.kd_weight * kd_sum + self.ce_weight * ce_sum) / max(int(num_tokens), 1)
        return Loss(total, kd_sum.detach(), ce_sum.detach())

    def _top_k(self, student_logits: Tensor, targets: TopKTargets) -> Tensor:
        """The plain calibration of a teacher at k classes, `[N]`."""
        plain = self.calibration
        if not isinstance(plain, Plain):
            raise InputError(f"{self.needs_logits} compares whole rows of logits, which top-k targets do not have")
        assert not isinstance(plain.divergence, AlphaBetaSchedule)
        if targets.shape != student_logits.shape:
            raise InputError(
                f"top-k targets {targets.shape} and student {tuple(student_logits.shape)} must have one shape"
            )
        targets.check_temperature(plain.temperature if plain.teacher_temperature is None else plain.teacher_temperature)
        return plain.factor * targets.compare(student_logits / plain.temperature, plain.divergence)

    @property
    def needs_logits(self) -> str:
        """Why `linear` cannot be used, in a few words; empty where it can."""
        if not isinstance(self.calibration, Plain):
            return f"the calibration {self.calibration.kind}"  # type: ignore[union-attr]
        return ""

    def linear(
        self,
        *,
        student_hidden: Tensor,
        student_head: LMHead,
        targets: Targets | None,
        labels: Tensor,
        num_tokens: Tensor | int,
    ) -> Loss:
        """The same loss without the logits, through `abkd.kernels.linear_loss`; for a plain calibration.

        Args:
            student_hidden: `[N, hidden]`, what the student's head receives at the counted tokens.
            targets: of the teacher at the same tokens; None only where kd_weight is 0.
            labels, num_tokens: as in a call.
        """
        plain = self.calibration
        assert isinstance(plain, Plain) and not isinstance(plain.divergence, AlphaBetaSchedule)
        each = torch.full((len(labels),), 1 / max(int(num_tokens), 1), device=labels.device)
        if self.kd_weight == 0:
            total, ce = linear_cross_entropy(student_hidden, student_head, labels, weights=self.ce_weight * each)
            return Loss(total, torch.zeros_like(total), ce.sum())
        if targets is None:
            raise InputError("targets is None, and kd_weight is above 0; give them, or set kd_weight=0")
        cross_entropy = {"labels": labels, "ce_weights": self.ce_weight * each} if self.ce_weight > 0 else {}
        total, divergence, _, ce = linear_loss(
            student_hidden,
            student_head,
            targets,
            divergence=plain.divergence,
            token_weights=self.kd_weight * plain.factor * each,
            temperature=plain.temperature,
            teacher_temperature=plain.teacher_temperature,
            **cross_entropy,
        )
        return Loss(total, plain.factor * divergence.sum(), ce.sum())
