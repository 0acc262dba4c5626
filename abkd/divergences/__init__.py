"""Divergences: teacher and student log-probabilities `[..., vocab]` in, nats `[...]` out, no reduction.

Each kind is a frozen dataclass that carries its parameters and is called like its function; `KINDS`
is the whole table. A new divergence is one function, one class and one row.
"""

from dataclasses import dataclass

from torch import Tensor

from abkd.divergences.alpha_beta import alpha_beta, forward_kl, reverse_kl

__all__ = ["KINDS", "AlphaBeta", "Divergence", "ForwardKL", "ReverseKL", "alpha_beta", "forward_kl", "reverse_kl"]


@dataclass(frozen=True)
class AlphaBeta:
    """`alpha_beta` at a fixed point of the plane. The default is the paper's choice for language models."""

    alpha: float = 0.2
    beta: float = 0.7

    def __call__(self, *, student: Tensor, teacher: Tensor) -> Tensor:
        return alpha_beta(student=student, teacher=teacher, alpha=self.alpha, beta=self.beta)


@dataclass(frozen=True)
class ForwardKL:
    """`forward_kl`, KL(teacher || student)."""

    def __call__(self, *, student: Tensor, teacher: Tensor) -> Tensor:
        return forward_kl(student=student, teacher=teacher)


@dataclass(frozen=True)
class ReverseKL:
    """`reverse_kl`, KL(student || teacher)."""

    def __call__(self, *, student: Tensor, teacher: Tensor) -> Tensor:
        return reverse_kl(student=student, teacher=teacher)


Divergence = AlphaBeta | ForwardKL | ReverseKL

KINDS: dict[str, type[Divergence]] = {
    "alpha_beta": AlphaBeta,
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
}
