"""Rows of a teacher -> tensors of bytes, and back.

Of top-k targets each kept class is `id_bits + value_bits` bits: its id, in as many bits as the vocabulary needs, and
-ln p in steps of `step` nats; each row has its number of classes and -ln of the mass of the rest in 16 bits. A sample's
drawn classes have their count as well. Rows become normalised when they are read, so that

    |ln p_read - ln p| <= step,   step = RANGE / (2^value_bits - 1),                                 (C1)

half of it from rounding, half at most from the mass that rounding added. A class below e^-RANGE is not kept; its mass
goes to the rest.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from abkd.divergences.top_k import Tail
from abkd.errors import InputError
from abkd.targets import TopKTargets
from abkd.teachers.cache.bits import num_bytes, pack_bits, unpack_bits

RANGE = 32.0
"""Nats: probabilities down to 1.3e-14."""
_TAIL_STEP = RANGE / 65_534
_TAIL_START = -32_767  # the code of mass 1
_NO_TAIL = -32_768


@dataclass(frozen=True)
class KeptEncoding:
    """Of `TopKTargets`.

    Args:
        vocab: classes of a row.
        value_bits: of -ln p, 4 to 16.
        num_draws: of a sample, up to 255; 0 for none.
        num_exact: classes of each row that are no draws; those come first in a row.
    """

    vocab: int
    value_bits: int = 12
    num_draws: int = 0
    num_exact: int = 0
    per_token: ClassVar[str] = "num_kept"
    """Of what is encoded, that which has an entry for each token."""

    @property
    def id_bits(self) -> int:
        return max(1, (self.vocab - 1).bit_length())

    @property
    def count_bits(self) -> int:
        """Of the count of a drawn class."""
        return self.num_draws.bit_length()

    @property
    def step(self) -> float:
        """Nats, the bound of (C1)."""
        return RANGE / (2**self.value_bits - 1)

    def most_bytes(self, num_tokens: int, k: int) -> int:
        """That so many tokens take with k classes each."""
        drawn = num_bytes(num_tokens * min(k, self.num_draws), self.count_bits)
        return num_tokens * 4 + num_bytes(num_tokens * k, self.id_bits + self.value_bits) + drawn

    def encode(self, targets: TopKTargets) -> dict[str, Tensor]:
        """Of all rows of `targets`, on the CPU."""
        log_probs, rest = targets.log_probs.double().cpu(), targets.tail_log_mass.double().cpu()
        too_small = (log_probs < -RANGE) & (log_probs > -math.inf)
        dropped = log_probs.masked_fill(~too_small, -math.inf).logsumexp(-1)
        rest, log_probs = torch.logaddexp(rest, dropped), log_probs.masked_fill(too_small, -math.inf)
        is_kept = log_probs > -math.inf
        codes = (-log_probs[is_kept] / self.step).round().long().clamp(min=0)
        ids = targets.ids.cpu()[is_kept].long()
        tail = (-rest / _TAIL_STEP).round().clamp(0, 65_534) + _TAIL_START
        encoded = {
            "num_kept": is_kept.sum(-1).to(torch.int16),
            "tail": tail.masked_fill(rest == -math.inf, _NO_TAIL).to(torch.int16),
            "entries": pack_bits(ids | codes << self.id_bits, self.id_bits + self.value_bits),
        }
        if self.num_draws:
            encoded["counts"] = self._pack_counts(targets, is_kept)
        return encoded

    def decode(self, encoded: dict[str, Tensor], tail: Tail, temperature: float) -> TopKTargets:
        """The rows again, fp32, normalised."""
        num_kept = encoded["num_kept"].long()
        entries = unpack_bits(encoded["entries"], int(num_kept.sum()), self.id_bits + self.value_bits)
        is_kept = torch.arange(int(num_kept.max()) if len(num_kept) else 1) < num_kept.unsqueeze(1)
        ids = torch.zeros(is_kept.shape, dtype=torch.int64)
        ids[is_kept] = entries & ((1 << self.id_bits) - 1)
        log_probs = torch.full(is_kept.shape, -math.inf)
        log_probs[is_kept] = -self.step * (entries >> self.id_bits)
        codes = encoded["tail"].float()
        rest = torch.where(codes == _NO_TAIL, -math.inf, -_TAIL_STEP * (codes - _TAIL_START))
        excess = torch.cat([log_probs, rest.unsqueeze(1)], dim=1).logsumexp(1)
        log_probs, rest = log_probs - excess.unsqueeze(1), rest - excess
        log_weights = None
        if self.num_draws:
            log_weights = self._log_weights(encoded["counts"], is_kept, log_probs, rest)
        return TopKTargets(ids, log_probs, rest, self.vocab, tail, temperature, log_weights)

    def _is_drawn(self, is_kept: Tensor) -> Tensor:
        return is_kept & (torch.arange(is_kept.shape[1]) >= self.num_exact)

    def _pack_counts(self, targets: TopKTargets, is_kept: Tensor) -> Tensor:
        """Out of the weights, each count * P(not exact) / (draws * p)."""
        assert targets.log_weights is not None
        log_probs, weights = targets.log_probs.double().cpu(), targets.log_weights.double().cpu()
        is_drawn = self._is_drawn(is_kept)
        others = log_probs.masked_fill(~self._is_drawn(log_probs > -math.inf), -math.inf).logsumexp(-1)
        others = torch.logaddexp(others, targets.tail_log_mass.double().cpu()).unsqueeze(-1)
        counts = ((weights + log_probs - others).exp() * self.num_draws).round()
        return pack_bits(counts[is_drawn].long(), self.count_bits)

    def _log_weights(self, packed: Tensor, is_kept: Tensor, log_probs: Tensor, rest: Tensor) -> Tensor:
        is_drawn = self._is_drawn(is_kept)
        others = torch.logaddexp(log_probs.masked_fill(~is_drawn, -math.inf).logsumexp(-1), rest).unsqueeze(-1)
        counts = torch.zeros(is_kept.shape)
        counts[is_drawn] = unpack_bits(packed, int(is_drawn.sum()), self.count_bits).float()
        weights = (counts / self.num_draws).log() + others - log_probs
        return weights.masked_fill(~is_drawn, 0.0).masked_fill(~is_kept, -math.inf)


@dataclass(frozen=True)
class DenseEncoding:
    """Of hidden states or logits `[N, width]`, as they are in `dtype`."""

    width: int
    dtype: torch.dtype
    per_token: ClassVar[str] = "rows"

    def most_bytes(self, num_tokens: int) -> int:
        return num_tokens * self.width * self.dtype.itemsize

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        """Raises InputError where a finite number is too large for `dtype`."""
        encoded = rows.to(self.dtype)
        if bool((encoded.isinf() & rows.isfinite()).any()):
            name, largest = str(self.dtype).removeprefix("torch."), rows.abs().masked_fill(rows.isinf(), 0.0).max()
            raise InputError(f"--dtype={name}: cannot hold the teacher's {largest.item():.4g}; use float32 or bfloat16")
        return {"rows": encoded.cpu()}
