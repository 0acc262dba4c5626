"""Probability mass by the teacher's ranking: numbers in, numbers out."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from abkd.ranks import gather

RANK_EDGES = (1, 2, 3, 6, 11, 101, 1001)
"""Buckets of the teacher's ranks: 1, 2, 3-5, 6-10, 11-100, 101-1000, and every rank from 1001."""


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
        edges = [edge for edge in RANK_EDGES if edge <= teacher.shape[-1]]
        top, order = teacher.topk(edges[-1] - 1, dim=-1)  # ranks 1 .. last edge - 1, [N, K]
        for name, ranked in (("_teacher", top), ("_student", student.gather(-1, order))):
            sums = ranked.exp().double().sum(dim=0)
            buckets = [sums[low - 1 : high - 1].sum() for low, high in itertools.pairwise(edges)]
            buckets.append(len(top) - sums.sum())
            buckets += [torch.zeros(())] * (len(RANK_EDGES) - len(edges))
            setattr(self, name, getattr(self, name) + torch.stack([bucket.double().cpu() for bucket in buckets]))
        self._num_tokens += len(top)

    def result(self) -> RankMass:
        """Over the tokens of all ranks, which all ask for it."""
        student, teacher = (sum(parts) for parts in zip(*gather((self._student, self._teacher)), strict=True))
        num_tokens = max(sum(gather(self._num_tokens)), 1)
        labels = [str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in itertools.pairwise(RANK_EDGES)]
        return RankMass(
            (*labels, f"{RANK_EDGES[-1]}+"),
            tuple((student / num_tokens).tolist()),
            tuple((teacher / num_tokens).tolist()),
        )
