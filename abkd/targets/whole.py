"""A teacher at all classes of each token: logits, or what its head makes them of."""

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

    @property
    def tensors(self) -> list[Tensor]:
        """Those that may ask for a gradient."""
        return [self.values]

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

    @property
    def tensors(self) -> list[Tensor]:
        """Those that may ask for a gradient."""
        return [self.hidden, *self.head.tensors]

    def logits(self, start: int, stop: int) -> Tensor:
        """`[stop - start, vocab]` in fp32 at least, differentiable."""
        return self.head.logits(self.hidden[start:stop])
