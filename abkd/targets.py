"""What a teacher gives for N tokens. Each kind hands out the logits of a range of rows, so that nobody needs all."""

from dataclasses import dataclass

import torch
from torch import Tensor

from abkd.errors import InputError
from abkd.head import LMHead


@dataclass(frozen=True, eq=False)
class DenseTargets:
    """Logits `[N, vocab]`, any float dtype; -inf forbids a class."""

    values: Tensor

    def __post_init__(self):
        if self.values.dim() != 2:
            raise InputError(f"logits of the teacher must be [N, vocab], got {tuple(self.values.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, vocab)."""
        return self.values.shape[0], self.values.shape[1]

    def logits(self, start: int, stop: int) -> Tensor:
        """`[stop - start, vocab]` in fp32 at least, differentiable."""
        rows = self.values[start:stop]
        return rows.to(torch.promote_types(rows.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class HiddenTargets:
    """What the teacher's output head receives, `[N, hidden]`, and the head: vocab / hidden times smaller."""

    hidden: Tensor
    head: LMHead

    def __post_init__(self):
        if self.hidden.dim() != 2 or self.hidden.shape[1] != self.head.weight.shape[1]:
            raise InputError(
                f"hidden states of the teacher must be [N, {self.head.weight.shape[1]}] for its head, "
                f"got {tuple(self.hidden.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, vocab)."""
        return self.hidden.shape[0], self.head.vocab

    def logits(self, start: int, stop: int) -> Tensor:
        """`[stop - start, vocab]` in fp32 at least, differentiable."""
        return self.head.logits(self.hidden[start:stop])


Targets = DenseTargets | HiddenTargets
