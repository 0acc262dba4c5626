"""Divergences from a teacher that is known at k classes and by the mass of the rest.

p is the teacher, q = e^x / Z the student, K the kept classes, R the rest. A divergence that adds over the classes,
D = sum_k f(p_k, q_k), with f(cp, cq) = c^s f(p, q), sees the rest of the student through

    L_a = ln sum_R e^(a x_j)                                                                   (7)

alone, at a = 1 and a = s, where the rest of the teacher is one class or 0, since

    sum_R f(0, q_j) = f(0, r),   r = (sum_R q_j^s)^(1/s),   ln r = L_s / s - ln Z.             (8)

So k logits and two sums of a row are enough, and their gradient on the rest is a softmax over it.
docs/teachers.md says what each tail means, and what it bounds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from abkd.divergences.kinds import (
    JSD,
    WSD,
    AlphaBeta,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
    SymmetricKL,
    TotalVariation,
)
from abkd.errors import InputError

Tail = Literal["lump", "uniform", "renormalise", "sampled"]

_NOTHING = -1e30  # for -inf in q ln q: 0 times it is 0
_OF_DEGREE_ONE = (ForwardKL, ReverseKL, SymmetricKL, WSD, JSD, SkewedForwardKL, SkewedReverseKL, TotalVariation)


def degree(divergence: Divergence) -> float | None:
    """s where D = sum_k f(p_k, q_k) with f(cp, cq) = c^s f(p, q); None where D is no sum over classes."""
    if isinstance(divergence, AlphaBeta):
        return divergence.alpha + divergence.beta
    return 1.0 if isinstance(divergence, _OF_DEGREE_ONE) else None


def is_reduced(divergence: Divergence, tail: Tail) -> bool:
    """Whether k logits and sums of the rest (7) give D; else it needs the teacher's row, the rest filled in.

    Raises:
        InputError: `sampled` with a divergence that is no sum over classes, of which no sample is unbiased.
    """
    power = degree(divergence)
    if tail == "sampled" and power is None:
        raise InputError(
            f"tail=sampled weighs classes, and {divergence.kind} is no sum over classes; use tail=lump or tail=uniform"
        )
    return tail in ("lump", "sampled") or (tail == "renormalise" and power is not None and power > 0)


def marks_of_kept(log_probs: Tensor) -> Tensor:
    """-inf where an entry keeps its class, else 0: added to a row at its ids, they leave its rest."""
    return torch.zeros_like(log_probs).masked_fill_(log_probs > -math.inf, -math.inf)


@dataclass(frozen=True, eq=False)
class Kept:
    """Rows of a teacher, normalised: `log_probs` and `log_rest` together have mass 1."""

    ids: Tensor
    """`[..., k]`, int64."""
    log_probs: Tensor
    """ln p_K, `[..., k]`; an entry at -inf keeps nothing, and its id is not looked at."""
    log_rest: Tensor
    """ln of the mass of R, `[...]`."""
    tail: Tail
    log_weights: Tensor | None = None
    """`[..., k]`, for `sampled`: the logarithm of how many classes each stands for."""

    def __getitem__(self, rows: slice) -> "Kept":
        weights = None if self.log_weights is None else self.log_weights[rows]
        return Kept(self.ids[rows], self.log_probs[rows], self.log_rest[rows], self.tail, weights)

    def see(self, logits: Tensor, divergence: Divergence, others: Sequence[float] = ()) -> "Seen":
        """Of the student's logits x `[..., vocab]` what `divergence` needs, and (7) at `others`. Differentiable."""
        power = degree(divergence) if self.tail != "lump" else None
        powers = [1.0, *others] if power is None or power <= 0 else [1.0, power, *others]
        powers = list(dict.fromkeys(powers))
        kept, rest_entropy, *sums = _See.apply(logits, self.ids, marks_of_kept(self.log_probs), *powers)
        return Seen(kept, dict(zip(powers, sums, strict=True)), rest_entropy)

    def compare(self, seen: "Seen", divergence: Divergence) -> Tensor:
        """D, `[...]`, where `is_reduced`."""
        total = seen.total(1.0)
        log_q, log_p = seen.kept - total, self.log_probs
        if self.tail == "lump":
            return divergence(student=seen.lumped, teacher=_beside(log_p, self.log_rest.unsqueeze(-1)))
        power = degree(divergence)
        assert power is not None
        if self.tail == "renormalise":
            log_p = log_p - log_p.logsumexp(-1, keepdim=True)
            rest = seen.sums[power] / power - total
            return divergence(student=_beside(log_q, rest), teacher=_beside(log_p, _zero(rest)))
        return self._sampled(log_q, None if power <= 0 else seen.sums[power] / power - total, divergence)

    def _sampled(self, log_q: Tensor, rest: Tensor | None, divergence: Divergence) -> Tensor:
        """sum_k f(0, q_k) + sum_K weight (f(p, q) - f(0, q)), or sum_K weight f(p, q) where f(0, q) is +inf."""
        assert self.log_weights is not None
        weights = self.log_weights.exp()
        values = weights * _by_class(divergence, log_q, self.log_probs)
        if rest is None or not _is_finite_at_zero(divergence):
            return values.sum(-1)
        values = values + (1 - weights) * _by_class(divergence, log_q, _zero(log_q))
        return values.sum(-1) + divergence(student=rest, teacher=_zero(rest))


@dataclass(frozen=True, eq=False)
class Seen:
    """What a divergence sees of the student's logits x."""

    kept: Tensor
    """x_K, `[..., k]`; -inf at an entry that keeps nothing."""
    sums: dict[float, Tensor]
    """a -> L_a (7), `[..., 1]`; -inf without a rest."""
    rest_entropy: Tensor
    """Of the softmax over R, `[...]`, detached, nats."""

    def total(self, power: float) -> Tensor:
        """ln sum_k e^(power x_k) over all classes, `[..., 1]`."""
        kept = self.kept if power == 1 else power * self.kept
        return _beside(kept, self.sums[power]).logsumexp(-1, keepdim=True)

    @property
    def lumped(self) -> Tensor:
        """ln q_K and ln q_R, `[..., k + 1]`."""
        return _beside(self.kept, self.sums[1.0]).log_softmax(-1)

    @property
    def entropy(self) -> Tensor:
        """Of the student, `[...]`, detached, nats: that of the lumped row, and of the rest by its mass."""
        q = self.lumped.detach().exp()
        return torch.special.entr(q).sum(-1) + q[..., -1] * self.rest_entropy


class _See(torch.autograd.Function):
    """(logits, ids, marks, *powers) -> x_K, the entropy of the rest, and (7) at each power, 1 the first."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, marks: Tensor, *powers: float):
        gap = logits.scatter_add(-1, ids, marks)  # x on the rest, -inf elsewhere
        top = gap.amax(-1, keepdim=True)
        top.masked_fill_(top.isneginf(), 0.0)
        gap.sub_(top)
        terms = [gap.exp() if power == 1 else (power * gap).exp_() for power in powers]
        sums = [term.sum(-1, keepdim=True) for term in terms]
        gap.clamp_(min=_NOTHING)
        entropy = sums[0].log() - torch.linalg.vecdot(terms[0], gap).unsqueeze(-1) / sums[0]
        entropy = entropy.masked_fill_(sums[0] == 0, 0.0).squeeze(-1)
        ctx.save_for_backward(ids, marks, *terms, *sums)
        ctx.powers = powers
        ctx.mark_non_differentiable(entropy)
        kept = logits.gather(-1, ids).masked_fill_(marks == 0, -math.inf)
        return kept, entropy, *(total.log().add_(power * top) for power, total in zip(powers, sums, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, kept_grad: Tensor, _: None, *grads: Tensor):
        ids, marks, *saved = ctx.saved_tensors
        terms, sums = saved[: len(grads)], saved[len(grads) :]
        scales = [
            (power * grad / total).masked_fill_(total == 0, 0.0)
            for power, grad, total in zip(ctx.powers, grads, sums, strict=True)
        ]
        logits_grad = terms[0] * scales[0]
        for term, scale in zip(terms[1:], scales[1:], strict=True):
            logits_grad.addcmul_(term, scale)
        logits_grad.scatter_add_(-1, ids, kept_grad.masked_fill(marks == 0, 0.0))
        return logits_grad, None, None, *(None for _ in ctx.powers)


def _by_class(divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """f(p, q) of each class: D of rows of one class."""
    return divergence(student=student.unsqueeze(-1), teacher=teacher.unsqueeze(-1))


@cache
def _is_finite_at_zero(divergence: Divergence) -> bool:
    """f(0, q) < inf."""
    return bool(divergence(student=torch.zeros(1), teacher=torch.full((1,), -math.inf)).isfinite())


def _zero(like: Tensor) -> Tensor:
    return torch.full_like(like, -math.inf)


def _beside(classes: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([classes, rest], dim=-1)
