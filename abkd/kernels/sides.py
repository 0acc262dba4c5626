"""Student and teacher as the chunks see them: logits of a range of rows, and gradients gathered range by range."""

from collections.abc import Sequence

import torch
from torch import Tensor

from abkd.divergences import Divergence
from abkd.divergences.top_k import Kept
from abkd.head import LMHead
from abkd.kernels.kept import why_reduced
from abkd.targets import MixtureTargets, TopKTargets

_TILE = 4096  # columns of the vocabulary per matrix product: their weights stay in a CPU's last cache between products


class Side:
    """Hidden states and a head: logits of a range of rows, and the gradients of both gathered range by range."""

    def __init__(
        self,
        hidden: Tensor,
        head: LMHead,
        needed: Sequence[bool],
        rows: int,
        dtype: torch.dtype,
        autocast: torch.dtype | None = None,
    ):
        hidden_needed, weight_needed, bias_needed = needed
        self.hidden, self.head, self.dtype = hidden, head, dtype
        self._factors = factor_dtype(hidden, head.weight, dtype, autocast)
        self._buffer = torch.empty(min(rows, len(hidden)), head.vocab, dtype=dtype, device=hidden.device)
        self._bent: Tensor | None = None  # d logits / d (hidden @ weight.T) where there is a soft-cap
        self.hidden_grad = torch.empty_like(hidden) if hidden_needed else None
        self.weight_grad = torch.zeros_like(head.weight, dtype=dtype) if weight_needed else None
        self.bias_grad = head.weight.new_zeros(head.vocab, dtype=dtype) if bias_needed else None

    @property
    def gradient_dtype(self) -> torch.dtype:
        """In which `accumulate` takes a gradient at no cost."""
        between = self.head.softcap is not None or self.head.logit_scale is not None or self.bias_grad is not None
        return self.dtype if between else self._factors

    def logits(self, start: int, stop: int) -> Tensor:
        """`[stop - start, vocab]`, in `dtype`; the next call writes over it."""
        weight, bias = self.head.weight, self.head.bias
        rows = self.hidden[start:stop].to(self._factors)
        logits = self._buffer[: len(rows)]
        for columns in self._tiles():
            tile = weight[columns].to(self._factors)
            if len(rows) < 256 and rows.device.type == "cpu" and rows.dtype == logits.dtype:
                logits[:, columns] = (tile @ rows.T).T  # a thin product is faster this way round
            else:
                add_product(logits[:, columns], rows, tile.T, keep=0)
        if bias is not None:
            logits += bias
        if self.head.logit_scale is not None:
            logits *= self.head.logit_scale
        if self.head.softcap is not None:
            bend = logits.div_(self.head.softcap).tanh_()
            self._bent = 1 - bend * bend
            logits *= self.head.softcap
        return logits

    def accumulate(self, start: int, stop: int, grad: Tensor) -> None:
        """Adds what d total / d logits `[stop - start, vocab]` means for hidden, weight and bias; writes over it."""
        if self._bent is not None:
            grad = grad.mul_(self._bent)
        if self.head.logit_scale is not None:
            grad = grad.mul_(self.head.logit_scale)
        if self.bias_grad is not None:
            self.bias_grad += grad.sum(0)
        grad, rows = grad.to(self._factors), self.hidden[start:stop].to(self._factors)
        hidden_grad = torch.zeros_like(rows, dtype=self.dtype)
        for columns in self._tiles():
            if self.hidden_grad is not None:
                add_product(hidden_grad, grad[:, columns], self.head.weight[columns].to(self._factors))
            if self.weight_grad is not None:
                add_product(self.weight_grad[columns], grad[:, columns].T, rows)
        if self.hidden_grad is not None:
            self.hidden_grad[start:stop] = hidden_grad

    def gradients(self) -> list[Tensor | None]:
        """Of hidden, weight and bias, in their dtypes; None where not needed."""
        weight_grad = None if self.weight_grad is None else self.weight_grad.to(self.head.weight.dtype)
        bias_grad = None if self.bias_grad is None else self.bias_grad.to(self.head.weight.dtype)
        return [self.hidden_grad, weight_grad, bias_grad]

    def _tiles(self) -> list[slice]:
        if self.head.weight.dtype == self._factors and self.hidden.device.type != "cpu":
            return [slice(0, self.head.vocab)]  # nothing is converted
        size = _TILE if self.hidden.device.type == "cpu" else 8 * _TILE
        return [slice(first, first + size) for first in range(0, self.head.vocab, size)]


def factor_dtype(hidden: Tensor, weight: Tensor, dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """Of both factors of a product, whose sums are `dtype`: bf16 on a GPU where the caller's own product would be bf16.

    fp16 is widened: a gradient of 1e-8 has no place in it.
    """
    own = autocast or torch.promote_types(hidden.dtype, weight.dtype)
    return torch.bfloat16 if own == torch.bfloat16 and hidden.device.type == "cuda" else dtype


def add_product(out: Tensor, first: Tensor, second: Tensor, keep: float = 1) -> None:
    """out = keep * out + first @ second, in place, summed in out's dtype whatever that of the factors."""
    if first.dtype == out.dtype:
        torch.addmm(out, first, second, beta=keep, out=out)
    else:
        torch.addmm(out, first, second, out_dtype=out.dtype, beta=keep, out=out)


class Rows:
    """Logits that are there already, as a `Side`."""

    def __init__(self, values: Tensor, needed: bool, dtype: torch.dtype):
        self.values, self.dtype = values, dtype
        self.grad = torch.empty_like(values) if needed else None

    def logits(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop].to(self.dtype, copy=True)

    def accumulate(self, start: int, stop: int, grad: Tensor) -> None:
        if self.grad is not None:
            self.grad[start:stop] = grad

    def gradients(self) -> list[Tensor | None]:
        return [self.grad, None, None]


class MadeRows:
    """Targets without a gradient as a side of the chunks: k classes of each row, or the rows of a chunk made for it."""

    def __init__(self, targets: TopKTargets | MixtureTargets, divergence: Divergence, dtype: torch.dtype):
        self.targets, self.dtype = targets, dtype
        self._reduced = bool(why_reduced(targets, divergence))

    def kept(self, start: int, stop: int) -> Kept | None:
        if not self._reduced:
            return None
        assert isinstance(self.targets, TopKTargets)
        return self.targets.rows(start, stop, self.dtype)

    def logits(self, start: int, stop: int) -> Tensor:
        """`[stop - start, vocab]`, or without a column where `kept` says it all."""
        if self._reduced:
            assert isinstance(self.targets, TopKTargets)
            return self.targets.log_probs.new_empty(stop - start, 0, dtype=self.dtype)
        return self.targets.logits(start, stop).to(self.dtype)

    def gradients(self) -> list[Tensor | None]:
        return [None, None, None]
