"""A teacher that is known at k classes of each token: whether a row of it is made, and the step where none is."""

import torch
from torch import Tensor

from abkd.divergences import Divergence
from abkd.divergences.top_k import Kept, is_reduced
from abkd.targets import Targets, TopKTargets

_BLOCK = 2**20  # elements of a temporary, on a CPU


def why_reduced(targets: Targets, divergence: Divergence) -> str:
    """Why no row of the teacher is made, in a few words; empty where one is."""
    if isinstance(targets, TopKTargets) and is_reduced(divergence, targets.tail):
        return f"the teacher is known at k classes, tail={targets.tail}"
    return ""


def kept_rows(
    student: Tensor,
    kept: Kept,
    weights: Tensor,
    ce_weights: Tensor | None,
    labels: Tensor | None,
    *,
    divergence: Divergence,
    temperature: float,
) -> Tensor:
    """D, entropy and cross-entropy, `[3, rows]`, of logits `[rows, vocab]`, which it writes the gradient over."""
    num_rows, vocab = student.shape
    values = torch.zeros(3, num_rows, dtype=student.dtype, device=student.device)
    block = max(1, _BLOCK // vocab) if student.device.type == "cpu" else num_rows
    for start in range(0, num_rows, block):
        rows = slice(start, start + block)
        logits = student[rows].detach().requires_grad_()
        with torch.enable_grad():
            tempered = logits if temperature == 1 else logits / temperature
            here = kept[rows]
            seen = here.see(tempered, divergence, () if labels is None else (temperature,))
            found = here.compare(seen, divergence)
            total = (weights[rows] * found).sum()
            if labels is not None and ce_weights is not None:
                label = labels[rows].unsqueeze(-1)
                log_total = seen.total(temperature).squeeze(-1)  # at temperature 1
                values[2, rows] = log_total.detach() - student[rows].gather(-1, label).squeeze(-1)
                total = total + (ce_weights[rows] * log_total).sum()
            (gradient,) = torch.autograd.grad(total, logits)
        values[0, rows], values[1, rows] = found.detach(), seen.entropy
        student[rows] = gradient
        if labels is not None and ce_weights is not None:
            student[rows].scatter_add_(-1, label, -ce_weights[rows].unsqueeze(-1))
    return values
