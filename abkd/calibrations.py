"""How a divergence is applied to logits with labels. One frozen dataclass per method; `CALIBRATIONS` is the table.

Each is called with logits `[N, classes]` of both and labels `[N]` and gives `[N]`, whose mean is the method's
loss of the batch. The divergence inside is the published one by default, any other makes the method's
alpha-beta form: `DKD()` is DKD, `DKD(AlphaBeta(0.8, 0.3))` is ABDKD.
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from abkd import ranges
from abkd.divergences import AlphaBetaSchedule, Divergence, ForwardKL, forward_kl
from abkd.errors import InputError

Scale = Literal["none", "squared"]


@dataclass(frozen=True)
class Calibration:
    """Called as `calibration(student_logits=, teacher_logits=, labels=)`; computes in fp32 at least.

    `labels` may be None where the method does not look at them (`needs_labels` is False).

    Raises:
        InputError: a parameter is out of its range; shapes differ; a label is not one of the classes.
    """

    kind: ClassVar[str]
    needs_labels: ClassVar[bool] = False

    def __call__(self, *, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
        _check(student_logits, teacher_logits, labels, self.needs_labels)
        return self.per_sample(student_logits.to(dtype), teacher_logits.to(dtype), labels)

    def per_sample(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """`[N]` of checked logits `[N, classes]`."""
        raise NotImplementedError

    def at(self, progress: float) -> "Calibration":
        """The calibration at `progress`, 0 to 1, of the training: a schedule inside becomes a divergence."""
        return self


@dataclass(frozen=True)
class DivergenceCalibration(Calibration):
    """A calibration with a divergence inside, or a schedule of them."""

    divergence: Divergence | AlphaBetaSchedule = field(default_factory=ForwardKL)

    def __post_init__(self):
        if not isinstance(self.divergence, (Divergence, AlphaBetaSchedule)):
            raise InputError(f"divergence must be one of abkd.divergences, as in ForwardKL(), got {self.divergence!r}")

    def at(self, progress: float) -> "DivergenceCalibration":
        return replace(self, divergence=self.divergence.at(progress))


@dataclass(frozen=True)
class Plain(DivergenceCalibration):
    """divergence(softmax(teacher / T'), softmax(student / T)), with ForwardKL() Hinton's KD.

    Args:
        temperature: T > 0, divides the logits of both.
        teacher_temperature: T' > 0, of the teacher's logits where it is another one.
        temperature_gradient_scale: "none" leaves the value as it is (as in the ABKD paper); "squared" multiplies
            it by T squared, which keeps the size of the gradient as T rises. Needs one temperature for both.

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531.
    """

    temperature: float = 1.0
    teacher_temperature: float | None = None
    temperature_gradient_scale: Scale = "none"
    kind = "plain"

    def __post_init__(self):
        super().__post_init__()
        ranges.temperatures(self.temperature, self.teacher_temperature, self.temperature_gradient_scale)

    def per_sample(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        teacher_temperature = self.temperature if self.teacher_temperature is None else self.teacher_temperature
        value = self.divergence(
            student=torch.log_softmax(student / self.temperature, dim=-1),
            teacher=torch.log_softmax(teacher / teacher_temperature, dim=-1),
        )
        return value * self.factor

    @property
    def factor(self) -> float:
        """T squared or 1."""
        return _factor(self.temperature, self.temperature_gradient_scale)


@dataclass(frozen=True)
class DKD(DivergenceCalibration):
    """target_weight * KL(target or not) + nontarget_weight * divergence(the classes but the target), times T^2.

    The first term compares the two-class rows (probability of the label, of all others), the second the other
    classes renormalised. The first stays a forward KL whatever the divergence, as in ABDKD.

    Args:
        target_weight, nontarget_weight: >= 0, not both 0.
        temperature, temperature_gradient_scale: as in `Plain`.

    Edges: with two classes the second term is 0, and where all others are at -inf in one of the rows.

    Source: Zhao et al., "Decoupled knowledge distillation", CVPR 2022, Eq. 7; weights and temperature of its
        CIFAR-100 recipe. Its warm-up over 20 of 240 epochs is `Objective.kd_warmup` = 20/240.
    """

    target_weight: float = 1.0
    nontarget_weight: float = 8.0
    temperature: float = 4.0
    temperature_gradient_scale: Scale = "squared"
    kind = "dkd"
    needs_labels = True

    def __post_init__(self):
        super().__post_init__()
        ranges.weights(target_weight=self.target_weight, nontarget_weight=self.nontarget_weight)
        ranges.temperatures(self.temperature, None, self.temperature_gradient_scale)

    def per_sample(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        is_target = torch.zeros_like(student, dtype=torch.bool).scatter_(-1, labels.long().unsqueeze(-1), True)
        student, teacher = student / self.temperature, teacher / self.temperature
        value = student.new_zeros(len(labels))
        if self.target_weight > 0:
            target = forward_kl(student=_target_or_not(student, is_target), teacher=_target_or_not(teacher, is_target))
            value = value + self.target_weight * target
        if self.nontarget_weight > 0:
            student, teacher = (logits.masked_fill(is_target, -math.inf) for logits in (student, teacher))
            alone = (student.isneginf().all(-1) | teacher.isneginf().all(-1)).unsqueeze(-1)
            student, teacher = (logits.masked_fill(alone, 0.0).log_softmax(-1) for logits in (student, teacher))
            value = value + self.nontarget_weight * self.divergence(student=student, teacher=teacher)
        return value * _factor(self.temperature, self.temperature_gradient_scale)


@dataclass(frozen=True)
class LSD(DivergenceCalibration):
    """divergence between the softmaxes of the standardised logits, (z - mean) / (sd * T), times T^2.

    Args:
        temperature, temperature_gradient_scale: as in `Plain`.

    Edges: mean and sd are over a row's logits above -inf, which alone forbids a class: a finite stand-in such as
        -1e9 would decide both. A constant row becomes zeros, with zero gradient.

    Source: Sun et al., "Logit standardization in knowledge distillation", CVPR 2024, with sd over all classes as
        published; its code takes the unbiased estimate plus 1e-7.
    """

    temperature: float = 2.0
    temperature_gradient_scale: Scale = "squared"
    kind = "lsd"

    def __post_init__(self):
        super().__post_init__()
        ranges.temperatures(self.temperature, None, self.temperature_gradient_scale)

    def per_sample(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        student, teacher = (standardize(z).div(self.temperature).log_softmax(-1) for z in (student, teacher))
        value = self.divergence(student=student, teacher=teacher)
        return value * _factor(self.temperature, self.temperature_gradient_scale)


@dataclass(frozen=True)
class TTM(DivergenceCalibration):
    """divergence(p^exponent / sum p^exponent, q): a transformed teacher against the student as it is.

    Args:
        exponent: > 0, 1/T of the teacher's temperature.

    Source: Zheng and Yang, "Knowledge distillation based on transformed teacher matching", ICLR 2024; exponent 0.1
        as in ABKD's recipes.
    """

    exponent: float = 0.1
    kind = "ttm"

    def __post_init__(self):
        super().__post_init__()
        ranges.exponent(self.exponent)

    def per_sample(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        transformed = (self.exponent * teacher).log_softmax(-1)
        return self.divergence(student=student.log_softmax(-1), teacher=transformed)


@dataclass(frozen=True)
class WTTM(TTM):
    """`TTM` with each sample weighted by its power sum, sum_k p_k^exponent: smooth teachers count for more.

    The weight is a constant to the gradient.

    Source: as `TTM`.
    """

    kind = "wttm"

    def per_sample(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        power_sum = (self.exponent * teacher.detach().log_softmax(-1)).logsumexp(-1).exp()
        return power_sum * super().per_sample(student, teacher, labels)


@dataclass(frozen=True)
class DIST(Calibration):
    """T^2 (inter_weight * (1 - r of a sample's classes) + intra_weight * (1 - r of a class over the batch)).

    r is Pearson's correlation of student's and teacher's probabilities. There is no divergence inside. The second
    term, a mean over the classes, belongs to the batch and is the same for each of its samples.

    Args:
        inter_weight, intra_weight: >= 0, not both 0.
        temperature, temperature_gradient_scale: as in `Plain`.

    Edges: a correlation with a constant counts as 0: uniform rows, and every class in a batch of one.

    Source: Huang et al., "Knowledge distillation from a stronger teacher", NeurIPS 2022, with the temperature of
        its CIFAR-100 recipe and the factor T^2 of its code.
    """

    inter_weight: float = 1.0
    intra_weight: float = 1.0
    temperature: float = 4.0
    temperature_gradient_scale: Scale = "squared"
    kind = "dist"

    def __post_init__(self):
        ranges.weights(inter_weight=self.inter_weight, intra_weight=self.intra_weight)
        ranges.temperatures(self.temperature, None, self.temperature_gradient_scale)

    def per_sample(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        log_q, log_p = (torch.log_softmax(logits / self.temperature, dim=-1) for logits in (student, teacher))
        between_classes = correlation_distance(_up_to_scale(log_q), _up_to_scale(log_p))
        over_the_batch = correlation_distance(_up_to_scale(log_q.mT), _up_to_scale(log_p.mT)).mean()
        value = self.inter_weight * between_classes + self.intra_weight * over_the_batch
        return value * _factor(self.temperature, self.temperature_gradient_scale)


@dataclass(frozen=True)
class MLKD(DivergenceCalibration):
    """Sum over T of T^2 * divergence + |Q Q^T - P P^T|^2 / N + |Q^T Q - P^T P|^2 / classes.

    Q and P hold the batch's probabilities at temperature T, `[N, classes]`. The two last terms, squares of
    Frobenius norms, belong to the batch and are the same for each of its samples. No matrix of the size of the
    classes squared is made.

    Args:
        temperatures: > 0, at least one.

    Source: Jin, Wang and Lin, "Multi-level logit distillation", CVPR 2023. Its code leaves the half of the samples
        and classes that the teacher is surest of out of some terms, and adds a second, augmented view; those are
        not part of the loss here.
    """

    temperatures: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0, 6.0)
    kind = "mlkd"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "temperatures", ranges.several_temperatures(self.temperatures))

    def per_sample(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        num_samples, num_classes = student.shape
        value = student.new_zeros(num_samples)
        for temperature in self.temperatures:
            log_q, log_p = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
            q, p = log_q.exp(), log_p.exp()
            error, both = q - p, q @ q.mT + p @ p.mT
            samples = (q @ q.mT - p @ p.mT).square().sum() / max(num_samples, 1)
            mixed = (error @ p.mT) * (error @ q.mT).mT
            classes = ((error @ error.mT) * both + 2 * mixed).sum() / num_classes  # of N x N products alone
            value = value + temperature**2 * self.divergence(student=log_q, teacher=log_p) + samples + classes
        return value


CALIBRATIONS: dict[str, type[Calibration]] = {kind.kind: kind for kind in (Plain, DKD, LSD, TTM, WTTM, DIST, MLKD)}
"""Name in recipes -> class."""


def _target_or_not(logits: Tensor, is_target: Tensor) -> Tensor:
    """Log-probabilities of the target and of all others together, `[N, 2]`."""
    log_probabilities = logits.log_softmax(-1)
    target, others = (log_probabilities.masked_fill(left_out, -math.inf) for left_out in (~is_target, is_target))
    return torch.stack([_log_sum(target), _log_sum(others)], dim=-1)


def _log_sum(log_probabilities: Tensor) -> Tensor:
    """`logsumexp` over the classes, with zero gradient where all are at -inf."""
    nothing = log_probabilities.isneginf().all(-1, keepdim=True)
    return log_probabilities.masked_fill(nothing, 0.0).logsumexp(-1).masked_fill(nothing.squeeze(-1), -math.inf)


def standardize(logits: Tensor) -> Tensor:
    """(z - mean) / sd of each row's logits above -inf, `[..., classes]`; a row of equal logits gives zeros."""
    there = ~logits.isneginf()
    count = there.sum(-1, keepdim=True).to(logits.dtype)
    centred = (logits - (logits.masked_fill(~there, 0.0) / count).sum(-1, keepdim=True)).masked_fill(~there, 0.0)
    lowest = logits.masked_fill(~there, math.inf).amin(-1, keepdim=True)
    centred = centred.masked_fill(lowest == logits.amax(-1, keepdim=True), 0.0)
    return (_unit(centred) * count.sqrt()).masked_fill(~there, -math.inf)


def correlation_distance(first: Tensor, second: Tensor) -> Tensor:
    """1 - r, r Pearson's correlation of two rows `[..., n]`, between 0 and 2; 1 where a row is constant."""
    first, second = (_unit(_centred(row)) for row in (first, second))
    aligned = (first - second).square().sum(-1) / 2  # of unit vectors: without cancellation at r = 1
    constant = (first == 0).all(-1) | (second == 0).all(-1)
    return aligned.masked_fill(constant, 1.0)


def _up_to_scale(log_row: Tensor) -> Tensor:
    """e^log_row over its largest: a correlation does not see the factor, and nothing underflows that matters."""
    if log_row.numel() == 0:
        return log_row.exp()
    largest = log_row.detach().amax(-1, keepdim=True)
    return (log_row - largest.masked_fill(largest.isneginf(), 0.0)).exp()


def _centred(row: Tensor) -> Tensor:
    """The row less its mean; exactly zeros where it is constant."""
    constant = (row == row[..., :1]).all(-1, keepdim=True)
    return (row - row.mean(-1, keepdim=True)).masked_fill(constant, 0.0)


def _unit(row: Tensor) -> Tensor:
    """The row at length 1, zeros where it is zeros. Its squares neither underflow nor overflow."""
    nothing = (row == 0).all(-1, keepdim=True)
    size = row.detach().abs().amax(-1, keepdim=True) if row.shape[-1] else row.new_ones((*row.shape[:-1], 1))
    row = row / size.masked_fill(nothing, 1.0)
    return row / row.square().sum(-1, keepdim=True).masked_fill(nothing, 1.0).sqrt()


def _factor(temperature: float, scale: Scale) -> float:
    return temperature**2 if scale == "squared" else 1.0


def _check(student: Tensor, teacher: Tensor, labels: Tensor | None, needs_labels: bool) -> None:
    if student.dim() != 2 or student.shape != teacher.shape or student.shape[1] == 0:
        raise InputError(
            f"student_logits {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)} must have one shape "
            "[N, classes]"
        )
    if not needs_labels:
        return
    if labels is None or labels.shape != student.shape[:1]:
        found = "None" if labels is None else tuple(labels.shape)
        raise InputError(f"labels must be [N] with N={student.shape[0]}, got {found}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise InputError(f"labels must be int64, got {labels.dtype}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < student.shape[1]:
        raise InputError(
            f"labels must lie between 0 and {student.shape[1] - 1}, got {int(labels.min())} to {int(labels.max())}"
        )
