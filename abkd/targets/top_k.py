"""A teacher at k classes of each token, and what is made of the rest."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from abkd import ranges
from abkd.divergences import Divergence
from abkd.divergences.top_k import Kept, Tail, is_reduced, marks_of_kept
from abkd.errors import InputError

_MASS_TOLERANCE = 0.01  # of a row's mass: what quantised log-probabilities may be off, and a forgotten rest is not


@dataclass(frozen=True, eq=False)
class TopKTargets:
    """The teacher at k classes of each token and by the mass of the rest, which `tail` makes something of.

    Args:
        ids: `[N, k]`, any integer dtype, 0 to vocab - 1; no class twice in a row.
        log_probs: `[N, k]`, the teacher's, at its temperature. -inf where a row keeps fewer than k: such an entry
            belongs to the rest, and its id is not looked at.
        tail_log_mass: `[N]`, ln of the mass of all other classes; -inf where it is 0.
        vocab: how many classes there are.
        tail: "lump", the rest is one class, for the student too; "uniform", the rest is spread evenly; "renormalise",
            the rest is 0 and the kept classes have all the mass; "sampled", the classes are a sample, with
            `log_weights`. docs/teachers.md says what each bounds, and how far it is off.
        temperature: which divided the teacher's logits before the softmax. No other can be asked for later.
        log_weights: `[N, k]`, for "sampled" alone: ln of how many classes each stands for, its count / (draws * chance
            of one draw).

    Raises:
        InputError: what does not fit; mass that is 1 % or more from 1.
    """

    ids: Tensor
    log_probs: Tensor
    tail_log_mass: Tensor
    vocab: int
    tail: Tail
    temperature: float = 1.0
    log_weights: Tensor | None = None

    def __post_init__(self):
        num_rows, k = self.ids.shape if self.ids.dim() == 2 else (-1, 0)
        if not 1 <= k <= self.vocab or self.ids.is_floating_point():
            raise InputError(f"ids must be integers [N, k], k from 1 to vocab={self.vocab}, got {_described(self.ids)}")
        shapes = {"log_probs": (num_rows, k), "tail_log_mass": (num_rows,)}
        shapes |= {"log_weights": (num_rows, k)} if self.log_weights is not None else {}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise InputError(f"{name} must be {list(shape)} for these ids, got {_described(getattr(self, name))}")
        if self.tail not in get_args(Tail):
            raise InputError(f"tail must be one of {', '.join(get_args(Tail))}, got {self.tail!r}")
        if (self.tail == "sampled") != (self.log_weights is not None):
            raise InputError("log_weights and tail=sampled go together; give both or neither")
        ranges.temperatures(self.temperature, None, "none")
        if num_rows:
            self._check_rows()

    @classmethod
    def of_logits(cls, logits: Tensor, k: int, *, tail: Tail, temperature: float = 1.0) -> "TopKTargets":
        """The k likeliest classes of logits `[N, vocab]`; `tail` is not "sampled"."""
        rows = _log_softmax(logits, temperature)
        log_probs, ids = rows.topk(k, dim=-1)
        rest = rows.scatter(-1, ids, -math.inf).logsumexp(-1)
        return cls(ids, log_probs, rest, rows.shape[1], tail, temperature)

    @classmethod
    def sample(
        cls,
        logits: Tensor,
        num_draws: int,
        *,
        num_exact: int = 0,
        exponent: float = 1.0,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> "TopKTargets":
        """The `num_exact` likeliest classes, and `num_draws` of the others, drawn with chances p^exponent, p theirs.

        A class drawn more than once is kept once, with as much more weight. tail is "sampled".

        Args:
            logits: `[N, vocab]`.
            num_draws: with replacement, at least 1.

        Source: importance sampling of the teacher's classes: Anshumann et al., "Sparse logit sampling", ACL 2025. There
            the weights multiply p, here the class, see docs/teachers.md.
        """
        rows = _log_softmax(logits, temperature)
        exact = rows.topk(num_exact, dim=-1).indices
        chances = (exponent * rows.double()).scatter(-1, exact, -math.inf).softmax(-1)  # fp32 would lose small ones
        drawn = torch.multinomial(chances.nan_to_num(1.0), num_draws, replacement=True, generator=generator)
        counts = torch.zeros_like(chances).scatter_add(-1, drawn, torch.ones_like(drawn, dtype=chances.dtype))
        counts.scatter_(-1, exact, math.inf)
        counts, ids = counts.topk(int((counts > 0).sum(-1).max()) if len(rows) else 1, dim=-1)
        log_probs = rows.gather(-1, ids).masked_fill(counts == 0, -math.inf)
        log_weights = (counts / num_draws).log() - chances.gather(-1, ids).log()
        log_weights = log_weights.masked_fill(counts.isinf(), 0.0).masked_fill(log_probs.isneginf(), -math.inf)
        rest = rows.scatter_add(-1, ids, marks_of_kept(log_probs)).logsumexp(-1)
        return cls(ids, log_probs, rest, rows.shape[1], "sampled", temperature, log_weights.to(rows.dtype))

    @classmethod
    def cat(cls, parts: Sequence["TopKTargets"]) -> "TopKTargets":
        """The rows of all parts, which differ in nothing else but k."""
        k = max(part.ids.shape[1] for part in parts)

        def whole(name: str, nothing: float) -> Tensor:
            return torch.cat([F.pad(x, (0, k - x.shape[1]), value=nothing) for x in (getattr(p, name) for p in parts)])

        log_weights = None if parts[0].log_weights is None else whole("log_weights", -math.inf)
        rest = torch.cat([part.tail_log_mass for part in parts])
        return parts[0]._with(
            ids=whole("ids", 0),
            log_probs=whole("log_probs", -math.inf),
            tail_log_mass=rest,
            log_weights=log_weights,
        )

    def at(self, rows: slice | Tensor) -> "TopKTargets":
        """Some of the rows."""
        return self._each(lambda tensor: tensor[rows])

    def within(self, top_p: float) -> "TopKTargets":
        """Of each row the fewest classes that together hold `top_p`, one at least, or all; the first come first.

        Args:
            top_p: 0 < top_p <= 1. The classes of a row stand in falling order, as `of_logits` gives them.
        """
        before = self.log_probs.exp().cumsum(-1) - self.log_probs.exp()
        return self._without(before >= top_p)

    def first(self, k: int) -> "TopKTargets":
        """Of each row its k first classes, the likeliest ones as `of_logits` gives them; the others join the rest."""
        return self._without(torch.arange(self.ids.shape[1], device=self.ids.device) >= k)

    def narrowed(self, vocab: int) -> "TopKTargets":
        """Without the classes from `vocab` on, as if their logits were -inf; those not kept are not known, and stay."""
        if vocab == self.vocab:
            return self
        is_out = (self.ids >= vocab) | self.log_probs.isneginf()
        order = is_out.long().argsort(dim=-1, stable=True)[:, :vocab]  # those that stay come first
        is_out = is_out.gather(-1, order)
        log_probs = self.log_probs.gather(-1, order).masked_fill(is_out, -math.inf)
        rest = self.tail_log_mass.masked_fill((~is_out).sum(-1) == vocab, -math.inf)  # all are kept: there is none
        excess = _log_mass(log_probs, rest)
        weights = self.log_weights
        return replace(
            self,
            ids=self.ids.gather(-1, order).masked_fill(is_out, 0),
            log_probs=log_probs - excess.unsqueeze(-1),
            tail_log_mass=rest - excess,
            vocab=vocab,
            log_weights=None if weights is None else weights.gather(-1, order).masked_fill(is_out, -math.inf),
        )

    def _without(self, is_out: Tensor) -> "TopKTargets":
        """With those entries in the rest."""
        dropped = self.log_probs.masked_fill(~is_out, -math.inf).logsumexp(-1)
        return self._with(
            log_probs=self.log_probs.masked_fill(is_out, -math.inf),
            tail_log_mass=torch.logaddexp(self.tail_log_mass, dropped),
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TopKTargets":
        """With each tensor changed."""
        given = {name: getattr(self, name) for name in ("ids", "log_probs", "tail_log_mass", "log_weights")}
        return self._with(**{name: change(tensor) for name, tensor in given.items() if tensor is not None})

    def _with(self, **changes: Tensor | None) -> "TopKTargets":
        """With other tensors; what was checked when the rows were made is not checked again."""
        changed = copy.copy(self)
        for name, tensor in changes.items():
            object.__setattr__(changed, name, tensor)
        return changed

    @property
    def shape(self) -> tuple[int, int]:
        """(N, vocab)."""
        return self.ids.shape[0], self.vocab

    @property
    def tensors(self) -> list[Tensor]:
        """Those that may ask for a gradient: none, a teacher that was written down is a constant."""
        return []

    def to(self, device: torch.device | str) -> "TopKTargets":
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Kept:
        """A range of rows, normalised."""
        log_probs, log_rest = self.log_probs[start:stop].to(dtype), self.tail_log_mass[start:stop].to(dtype)
        excess = _log_mass(log_probs, log_rest)
        return Kept(
            self.ids[start:stop].long(),
            log_probs - excess.unsqueeze(-1),
            log_rest - excess,
            self.tail,
            None if self.log_weights is None else self.log_weights[start:stop].to(dtype),
        )

    def logits(self, start: int, stop: int) -> Tensor:
        """`[stop - start, vocab]` in fp32 at least: the rows of "uniform", or of "renormalise" where that is the tail.

        They are at `temperature` already.
        """
        kept = self.rows(start, stop, torch.promote_types(self.log_probs.dtype, torch.float32))
        num_rest = self.vocab - (kept.log_probs > -math.inf).sum(-1)
        each = kept.log_rest - num_rest.clamp(min=1).to(kept.log_rest.dtype).log()
        if self.tail == "renormalise":
            each = torch.full_like(each, -math.inf)
        rows = each.unsqueeze(-1).expand(-1, self.vocab).scatter_add(-1, kept.ids, marks_of_kept(kept.log_probs))
        return rows.scatter_reduce_(-1, kept.ids, kept.log_probs, "amax")  # an entry that keeps nothing writes nothing

    def compare(self, student_logits: Tensor, divergence: Divergence) -> Tensor:
        """The divergence of the student, whose logits `[N, vocab]` are at its temperature: `[N]`, nats, differentiable.

        The teacher's row is made only where `abkd.divergences.top_k.is_reduced` says no.
        """
        if not is_reduced(divergence, self.tail):
            return divergence(
                student=student_logits.log_softmax(-1), teacher=self.logits(0, len(self.ids)).log_softmax(-1)
            )
        kept = self.rows(0, len(self.ids), student_logits.dtype)
        return kept.compare(kept.see(student_logits, divergence), divergence)

    def check_temperature(self, temperature: float) -> None:
        """Raises InputError where the teacher is asked for at another temperature than it was made at."""
        if temperature != self.temperature:
            raise InputError(
                f"teacher_temperature is {temperature!r}, and these top-k targets were made at {self.temperature!r}, "
                f"which k classes cannot leave; use teacher_temperature={self.temperature!r}, or make them again"
            )

    def _check_rows(self) -> None:
        """What takes a look at the numbers."""
        ids = self.ids.long()
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab:
            raise InputError(f"ids must lie between 0 and {self.vocab - 1}")
        is_kept = self.log_probs > -math.inf
        nothing = -1 - torch.arange(ids.shape[1], device=ids.device)
        ordered = torch.where(is_kept, ids, nothing).sort(dim=-1).values
        if twice := (ordered[:, 1:] == ordered[:, :-1]).any(-1).nonzero().flatten().tolist():
            raise InputError(f"ids must differ within a row, and row {twice[0]} keeps a class twice")
        mass = _log_mass(self.log_probs.double(), self.tail_log_mass.double()).exp()
        if wrong := (~((mass - 1).abs() < _MASS_TOLERANCE)).nonzero().flatten().tolist():
            raise InputError(
                f"log_probs and tail_log_mass of a row must have mass 1 together, and row {wrong[0]} has "
                f"{mass[wrong[0]].item():.4g}; renormalise the kept ones, or give the mass of the rest"
            )
        counts = is_kept.sum(-1)
        if not bool((counts > 0).all()):
            raise InputError(f"each row must keep a class, and row {int(counts.argmin())} keeps none")
        if bool(((counts == self.vocab) & (self.tail_log_mass > -math.inf)).any()):
            raise InputError("tail_log_mass must be -inf where a row keeps all classes, so that there is no rest")
        if self.log_weights is not None and not bool((self.log_weights.isfinite() | ~is_kept).all()):
            raise InputError("log_weights must be finite where a class is kept; one of weight 0 is not kept")


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """`[N, vocab]`, fp32 at least."""
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)


def _log_mass(log_probs: Tensor, log_rest: Tensor) -> Tensor:
    return torch.cat([log_probs, log_rest.unsqueeze(-1)], dim=-1).logsumexp(-1)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
