"""ITRD: the student's features correlate with the teacher's, channel by channel, and hold what the teacher's hold."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from abkd import ranges
from abkd.calibrations import correlation_distance
from abkd.errors import InputError
from abkd.features.losses import FeatureLoss, FeatureMethod, unit

Measure = Literal["purity", "bits"]


@dataclass(frozen=True)
class ITRD(FeatureMethod):
    """corr_weight * correlation_loss + mutual_weight * mutual_loss, of the whole batch, the same for each example.

    A linear layer, trained with the student, takes the student's feature to the teacher's dimension; `mutual_loss`
    sees the student's feature itself where both have one dimension.

    Args:
        corr_weight, mutual_weight: >= 0, not both 0.
        order: Renyi's, above 0, in `correlation_loss`: 1.01 between networks of one kind, 1.5 between others.
        mutual_in: "purity" or "bits", see `mutual_loss`.
        seed: of the linear layer's initial state.

    Source: Miles, Lopez Rodriguez and Mikolajczyk, "Information theoretic representation distillation", BMVC 2022,
        and the code with it: weights 2 and 1 for CIFAR-100, where the whole term has weight 1.
    """

    corr_weight: float = 2.0
    mutual_weight: float = 1.0
    order: float = 1.5
    mutual_in: Measure = "purity"
    kind = "itrd"

    def __post_init__(self):
        ranges.weights(corr_weight=self.corr_weight, mutual_weight=self.mutual_weight)
        if not 0 < ranges.finite("order", self.order) <= 100:
            raise InputError(f"order must be above 0, and at most 100, got {self.order!r}")
        if self.mutual_in not in ("purity", "bits"):
            raise InputError(f"mutual_in must be purity or bits, got {self.mutual_in!r}")

    def make(self, student_dim: int, teacher_dim: int, num_examples: int, labels: Tensor | None) -> "ITRDLoss":
        return ITRDLoss(self, student_dim, teacher_dim, num_examples)


class ITRDLoss(FeatureLoss):
    """`ITRD` of one training, see `FeatureLoss`. Under several ranks each compares the examples of its own batch."""

    def __init__(self, method: ITRD, student_dim: int, teacher_dim: int, num_examples: int):
        super().__init__(student_dim, teacher_dim, num_examples)
        self.method = method
        self.embed = nn.Linear(student_dim, teacher_dim)

    def per_sample(self, student: Tensor, teacher: Tensor, example_ids: Tensor) -> Tensor:
        embedded = self.embed(student)
        if len(student) == 0:
            return embedded.sum(-1)
        same = student if self.student_dim == self.teacher_dim else embedded
        value = embedded.sum() * 0.0
        if self.method.corr_weight > 0:
            value = value + self.method.corr_weight * correlation_loss(embedded, teacher, self.method.order)
        if self.method.mutual_weight > 0:
            value = value + self.method.mutual_weight * mutual_loss(same, teacher, self.method.mutual_in)
        return value.expand(len(student))


def correlation_loss(student: Tensor, teacher: Tensor, order: float) -> Tensor:
    """log2 sum_i |1 - c_i|^(2 order), c_i = (1 - 1/batch) * Pearson's correlation of channel i over the batch.

    Args:
        student, teacher: `[batch, dim]`, batch >= 1.
        order: above 0.

    Returns:
        Scalar, between log2 dim - 2 order log2 batch, where all channels correlate, and log2 dim + 2 order.

    Edges: the correlation with a channel that is constant over the batch is 0, as in a batch of one.

    Source: as `ITRD`. The factor 1 - 1/batch is its code's: the mean over the batch of a product of channels divided
        by their unbiased standard deviations. It is what keeps the logarithm finite.
    """
    share = 1 / len(student)
    distance = share + (1 - share) * correlation_distance(student.mT, teacher.mT)  # 1 - c without cancellation
    return distance.pow(2 * order).sum().log2()


def mutual_loss(student: Tensor, teacher: Tensor, measured_in: Measure = "purity") -> Tensor:
    """purity(S) - purity(S * T): less the student's own entropy, more what it shares with the teacher.

    S and T hold the cosines between the features of two examples, S * T is their product element by element. "bits"
    takes log2 of both: then it is the matrix-based mutual information of Renyi's order 2 with a minus sign, up to
    the teacher's entropy, which is a constant.

    Args:
        student, teacher: `[batch, any dim]`, batch >= 1.

    Returns:
        Scalar; 0 for a batch of one.

    Edges: a feature of zeros has cosine 0 with all, itself included, and gets no gradient.

    Source: as `ITRD`, whose code takes no logarithm here; entropy: Sanchez Giraldo, Rao and Principe, "Measures of
        entropy from data using infinitely divisible kernels", IEEE Trans. Inf. Theory 2015.
    """
    student, teacher = unit(student), unit(teacher)
    own = student @ student.mT
    alone, joint = purity(own), purity(own * (teacher @ teacher.mT))
    return alone - joint if measured_in == "purity" else alone.log2() - joint.log2()


def purity(gram: Tensor) -> Tensor:
    """tr K^2 / (tr K)^2 of a positive semi-definite matrix `[n, n]`; -log2 of it is Renyi's entropy of order 2 in bits.

    Returns:
        Scalar from 1/n (all eigenvalues equal) to 1 (one alone). A matrix of zeros counts as pure: 1, zero gradient.
    """
    trace = gram.diagonal().sum()
    nothing = trace == 0
    return (gram / trace.masked_fill(nothing, 1.0)).square().sum().masked_fill(nothing, 1.0)
