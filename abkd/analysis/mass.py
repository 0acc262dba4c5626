"""Probability mass by the teacher's ranking: numbers in, numbers out."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from abkd.ranks import gather

RANK_EDGES = (1, 2, 3, 6, 11, 101, 1001)
"""Buckets of the teacher's ranks: 1, 2, 3-5, 6-10, 11-100, 101-1000, and every rank from 1001."""
RANK_LABELS = (
    *(str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in itertools.pairwise(RANK_EDGES)),
    f"{RANK_EDGES[-1]}+",
)


class RankMass(NamedTuple):
    labels: tuple[str, ...]
    student: tuple[float, ...]
    """Mean probability that the student gives to the tokens of each bucket; sums to 1."""
    teacher: tuple[float, ...]
    """The same of the teacher."""


class RankMassMeter:
    """Gathers `RankMass` over batches: call it with log-probabilities `[N, vocab]` of student and teacher."""

    def __init__(self) -> None:
        self._student = self._teacher = torch.zeros(len(RANK_EDGES), dtype=torch.float64)
        self._num_tokens = 0

    def __call__(self, student: Tensor, teacher: Tensor) -> None:
        order = rank_order(teacher)
        for name, rows in (("_teacher", teacher), ("_student", student)):
            sums = rank_sums(rows.gather(-1, order).exp(), total=len(order))
            setattr(self, name, getattr(self, name) + sums.cpu())
        self._num_tokens += len(order)

    def result(self) -> RankMass:
        """Over the tokens of all ranks, which all ask for it."""
        student, teacher = (sum(parts) for parts in zip(*gather((self._student, self._teacher)), strict=True))
        num_tokens = max(sum(gather(self._num_tokens)), 1)
        return RankMass(RANK_LABELS, tuple((student / num_tokens).tolist()), tuple((teacher / num_tokens).tolist()))


def rank_order(teacher: Tensor) -> Tensor:
    """The classes of the ranks below the last edge, the teacher's likeliest first: `[N, K]` of `[N, vocab]`."""
    return teacher.topk(min(RANK_EDGES[-1] - 1, teacher.shape[-1]), dim=-1).indices


def rank_sums(ranked: Tensor, total: Tensor | float) -> Tensor:
    """One sum a bucket, over all rows, in fp64.

    Args:
        ranked: `[N, K]`, values of the classes of `rank_order`.
        total: the sum of the values of all classes of all rows.
    """
    sums = ranked.double().sum(dim=0)
    buckets = [sums[low - 1 : high - 1].sum() for low, high in itertools.pairwise(RANK_EDGES)]
    beyond = total - sums.sum() if len(sums) == RANK_EDGES[-1] - 1 else torch.zeros_like(sums.sum())
    return torch.stack([*buckets, beyond])
