"""One frozen dataclass per divergence: it carries the parameters and is called like its function. `KINDS` is the table.

A new divergence is one function, one class and row here, its range in `ranges` and its section in `config`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from abkd import ranges
from abkd.divergences.alpha_beta import alpha_beta, forward_kl, reverse_kl
from abkd.divergences.composite import akl, alphanet, bdkd, symmetric_kl, total_variation, wsd
from abkd.divergences.mixture import alpha_mixture, jsd, skewed_forward_kl, skewed_reverse_kl


@dataclass(frozen=True)
class Divergence:
    """Called with log-probabilities `[..., vocab]` it gives nats `[...]`. Equal parameters make equal divergences.

    Raises:
        InputError: a parameter is out of its range.
    """

    function: ClassVar[Callable[..., Tensor]]
    kind: ClassVar[str]
    """The function's name."""

    def __init_subclass__(cls):
        cls.kind = cls.function.__name__

    def __post_init__(self):
        ranges.check(self.kind, **self.parameters)

    def __call__(self, *, student: Tensor, teacher: Tensor) -> Tensor:
        return type(self).function(student=student, teacher=teacher, **self.parameters)

    def at(self, progress: float) -> "Divergence":
        """Itself: a divergence does not move during training. `AlphaBetaSchedule` does."""
        return self

    @property
    def parameters(self) -> dict[str, float]:
        """The keyword arguments of the function."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """`alpha_beta` at a fixed point of the plane. The default is the paper's choice for language models."""

    alpha: float = 0.2
    beta: float = 0.7
    function = alpha_beta


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """`forward_kl`, KL(teacher || student)."""

    function = forward_kl


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """`reverse_kl`, KL(student || teacher)."""

    function = reverse_kl


@dataclass(frozen=True)
class SymmetricKL(Divergence):
    """`symmetric_kl`, the sum of both KLs."""

    function = symmetric_kl


@dataclass(frozen=True)
class JSD(Divergence):
    """`jsd`; mix is the teacher's share."""

    mix: float = 0.5
    function = jsd


@dataclass(frozen=True)
class SkewedForwardKL(Divergence):
    """`skewed_forward_kl`; mix is the teacher's share, DistiLLM's lambda."""

    mix: float = 0.1
    function = skewed_forward_kl


@dataclass(frozen=True)
class SkewedReverseKL(Divergence):
    """`skewed_reverse_kl`; mix is the teacher's share, 1 - DistiLLM's lambda."""

    mix: float = 0.9
    function = skewed_reverse_kl


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """`total_variation`, half of the L1 distance."""

    function = total_variation


@dataclass(frozen=True)
class WSD(Divergence):
    """`wsd`, a weighted sum of both KLs."""

    forward_weight: float = 0.5
    reverse_weight: float = 0.5
    function = wsd


@dataclass(frozen=True)
class AKL(Divergence):
    """`akl`, both KLs weighted by where the rows differ."""

    head_mass: float = 0.5
    function = akl


@dataclass(frozen=True)
class BDKD(Divergence):
    """`bdkd`, both KLs weighted by which row has more entropy."""

    gain: float = 2.0
    function = bdkd


@dataclass(frozen=True)
class AlphaNet(Divergence):
    """`alphanet`, the larger of two alpha-divergences."""

    alpha_low: float = -1.0
    alpha_high: float = 1.0
    function = alphanet


@dataclass(frozen=True)
class AlphaMixture(Divergence):
    """`alpha_mixture`, `alpha_beta` towards AMiD's assistant between student and teacher."""

    alpha: float = 0.2
    beta: float = 0.7
    mix: float = 0.1
    order: float = -1.0
    function = alpha_mixture


KINDS: dict[str, type[Divergence]] = {
    kind.kind: kind
    for kind in (
        AlphaBeta, ForwardKL, ReverseKL, SymmetricKL, JSD, SkewedForwardKL, SkewedReverseKL, TotalVariation, WSD, AKL,
        BDKD, AlphaNet, AlphaMixture,
    )
}  # fmt: skip
"""Name in recipes -> class."""


def alpha_divergence(alpha: float) -> AlphaBeta:
    """The alpha-divergences of Chernoff and Amari: the line from reverse KL (0) to forward KL (1)."""
    return AlphaBeta(alpha, 1 - alpha)


def beta_divergence(beta: float) -> AlphaBeta:
    """The beta-divergences of Basu et al.: the line from forward KL (0) through the squared Euclidean distance (1)."""
    return AlphaBeta(1.0, beta)


FORWARD_KL = AlphaBeta(1.0, 0.0)
REVERSE_KL = AlphaBeta(0.0, 1.0)
HELLINGER = AlphaBeta(0.5, 0.5)
"""2 sum (sqrt p - sqrt q)^2, four times the squared Hellinger distance."""
EUCLIDEAN = AlphaBeta(1.0, 1.0)
"""(1/2) sum (p - q)^2."""
ITAKURA_SAITO = AlphaBeta(1.0, -1.0)
"""sum [p/q - ln(p/q) - 1]."""
LOG_EUCLIDEAN = AlphaBeta(0.0, 0.0)
"""(1/2) sum (ln p - ln q)^2."""
PEARSON = AlphaBeta(2.0, -1.0)
"""(1/2) sum (p - q)^2 / q."""
NEYMAN = AlphaBeta(-1.0, 2.0)
"""(1/2) sum (p - q)^2 / p."""
LLM = AlphaBeta(0.2, 0.7)
"""The paper's choice for language models."""
CIFAR = AlphaBeta(0.8, 0.3)
"""The paper's commonest choice for CIFAR-100."""
