"""Several teachers of one vocabulary as one."""

from collections.abc import Sequence
from typing import Any

import torch

from abkd.errors import InputError
from abkd.targets import MixtureTargets
from abkd.teachers.teacher import Teacher


class MixtureTeacher(Teacher):
    """p = sum_i weights[i] * p_i over the teachers' distributions; each teacher of any kind.

    Args:
        teachers: of one tokenizer. Where their rows differ in length, by padding, all get that of the shortest.
        weights: > 0, one for each; empty is the same for all.
    """

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float] = ()):
        if not teachers:
            raise InputError("teachers: a mixture needs one at least")
        self.teachers, self.weights = list(teachers), list(weights) or [1.0] * len(teachers)
        if len(self.weights) != len(self.teachers):
            raise InputError(
                f"weights: {len(self.weights)} of them for {len(self.teachers)} teachers; give one for each"
            )
        self.narrow(min(teacher.vocab for teacher in teachers))

    @property
    def parts(self) -> tuple[Teacher, ...]:
        return tuple(self.teachers)

    @property
    def vocab(self) -> int:
        return self.teachers[0].vocab

    @property
    def approximation(self) -> str:
        return "; ".join(dict.fromkeys(each.approximation for each in self.teachers if each.approximation))

    def narrow(self, vocab: int) -> None:
        for teacher in self.teachers:
            if teacher.vocab > vocab:
                teacher.narrow(vocab)

    @torch.no_grad()
    def targets(self, **batch: Any) -> MixtureTargets:
        return MixtureTargets([teacher.targets(**batch) for teacher in self.teachers], self.weights)
