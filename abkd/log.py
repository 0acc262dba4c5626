"""What the trainer counts between two lines of its log."""

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from abkd.kernels.reference import entropy
from abkd.objective import Loss
from abkd.targets import Targets, TopKTargets

ROWS = 32
"""Tokens whose rows are looked at for one line."""
COUNTED = ("kd", "ce", "num_tokens", "num_read", "lm", "lm_tokens", "features")
_MOVES = ("moved", "over_to_under", "into_target", "into_top", "into_tail", "misplaced")
OF_MASS = tuple(f"mass_{name}" for name in _MOVES)
MASS_ELEMENTS = 2**18
"""As many of these rows as hold so many numbers are stepped, under 1 % of a step's time."""
OF_ROWS = ("student_entropy", "teacher_entropy", "token_accuracy", "token_agreement")


class StepLog:
    """Sums since the last line; sums of several ranks add up. docs/metrics.md says what each key means."""

    def __init__(self):
        counts = ("num_rows", "num_teacher_rows", "num_mass_rows", "num_target_rows")
        self._sums = dict.fromkeys((*COUNTED, *OF_ROWS, *OF_MASS, *counts), 0.0)
        self._of_batches: Tensor | float = 0.0  # fp64 [4], kd, ce, num_tokens, num_read; on the model's device
        self.started = time.monotonic()

    def add(self, loss: Loss, mask: Tensor, attention_mask: Tensor) -> None:
        """One micro-batch; does not wait for a GPU."""
        counts = mask.sum(), attention_mask.sum()
        self._of_batches = self._of_batches + torch.stack([loss.kd_sum, loss.ce_sum, *counts]).double()

    @property
    def sums(self) -> dict[str, float]:
        """Of this rank."""
        if isinstance(self._of_batches, float):
            return self._sums
        return self._sums | dict(zip(("kd", "ce", "num_tokens", "num_read"), self._of_batches.tolist(), strict=True))

    def add_lm(self, loss: Loss, num_tokens: int) -> None:
        """The corpus's part of a micro-batch."""
        self._sums["lm"] += loss.ce_sum.item()
        self._sums["lm_tokens"] += num_tokens

    def add_features(self, weighted_sum: Tensor) -> None:
        """The terms on features of a micro-batch of images, times their weights."""
        self._sums["features"] += weighted_sum.item()

    @torch.no_grad()
    def add_rows(
        self,
        student: Targets,
        teacher: Targets | None,
        labels: Tensor,
        place: int,
        step: Callable[..., dict[str, float]] | None = None,
    ) -> None:
        """Entropies, accuracy and agreement of `ROWS` consecutive tokens, other ones for another `place`.

        Args:
            step: `analysis.movement.mass_scalars` of the objective: where a step on these rows would move the mass.
        """
        first = place * ROWS % max(len(labels) - ROWS + 1, 1)
        labels = labels[first : first + ROWS]
        if not len(labels):
            return
        q = student.logits(first, first + len(labels)).log_softmax(-1)
        found = {"num_rows": len(labels), "student_entropy": entropy(q).sum().item()}
        found["token_accuracy"] = (q.argmax(-1) == labels).sum().item()
        if teacher is not None:
            rows = teacher.logits(first, first + len(labels)).to(q.device)
            if isinstance(teacher, TopKTargets):
                rows = teacher.temperature * rows  # what it divided
            p = rows.log_softmax(-1)
            found |= {"num_teacher_rows": len(labels), "teacher_entropy": entropy(p).sum().item()}
            found["token_agreement"] = (p.argmax(-1) == q.argmax(-1)).sum().item()
            if step is not None:
                chosen = slice(max(1, MASS_ELEMENTS // q.shape[-1]))
                given = labels[chosen] if (labels[chosen] >= 0).all() else None  # an image may have no label
                moves = step(student=q[chosen], teacher=p[chosen], labels=given)
                count = len(labels[chosen])
                found |= {name: value * count for name, value in moves.items()} | {"num_mass_rows": count}
                found["num_target_rows"] = 0 if given is None else count
        for name, value in found.items():
            self._sums[name] += value


def figures(sums: dict[str, float], seconds: float, device: torch.device) -> dict[str, float]:
    """A line of the log, out of the sums over all ranks."""
    num_tokens = max(sums["num_tokens"], 1)
    line = {"kd": sums["kd"] / num_tokens, "ce": sums["ce"] / num_tokens, "num_tokens": sums["num_tokens"]}
    if sums["lm_tokens"]:
        line["lm"] = sums["lm"] / sums["lm_tokens"]
    if sums["features"]:
        line["features"] = sums["features"] / num_tokens
    counts = {"teacher_entropy": "num_teacher_rows", "token_agreement": "num_teacher_rows"}
    for name in OF_ROWS:
        if count := sums[counts.get(name, "num_rows")]:
            line[name] = sums[name] / count
    for name in OF_MASS:
        if count := sums["num_target_rows" if name == "mass_into_target" else "num_mass_rows"]:
            line[name] = sums[name] / count
    line["masked_share"] = 1 - sums["num_tokens"] / max(sums["num_read"], 1)
    line["tokens_per_s"] = sums["num_tokens"] / max(seconds, 1e-9)
    line["peak_memory_gib"] = _peak_memory(device) / 2**30
    return line


def _peak_memory(device: torch.device) -> int:
    """Bytes of a GPU that tensors took at most, or of the process's resident memory, since the start of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit: Any = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
