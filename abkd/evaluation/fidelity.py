"""How close a student is to its teacher on held-out completions."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from abkd.divergences import Divergence
from abkd.errors import InputError
from abkd.head import LMHead, check_head, completion_hidden, completion_logits
from abkd.objective import completion_mask
from abkd.ranks import summed
from abkd.targets import DenseTargets, HiddenTargets, Targets, TopKTargets

ROWS = 256
"""Tokens whose logits exist at a time: memory does not grow with the batch."""


@torch.no_grad()
def fidelity(
    student: nn.Module,
    teacher_targets: Callable[..., Targets] | None,
    batches: Iterable[Mapping[str, Tensor]],
    divergences: Mapping[str, Divergence],
    *,
    per_token: Callable[[Tensor, Tensor], None] = lambda student, teacher: None,
) -> dict[str, float]:
    """Means over the completion tokens of all batches of all ranks, at temperature 1.

    Top-k targets were made at a temperature of their own, and the student is compared with them at that one.

    Args:
        teacher_targets: `InProcessTeacher.targets`, or any function of its signature; None where there is no teacher.
        batches: as the collator makes them; of several ranks each gives its own, as many as the others.
        divergences: name -> divergence; each name is a key of the result.
        per_token: called with the log-probabilities of student and teacher, `[rows, vocab]`, of all tokens in turn.

    Returns:
        `next_token_loss` (cross-entropy of the student with the data, nats per token), `entropy` (Shannon entropy of
        the student, nats per token) and `num_tokens`; with a teacher each divergence (nats per token) and
        `token_agreement` (share of tokens where both have the same most probable token, 0 to 1).
    """
    was_training = student.training
    student.eval()
    device = next(student.parameters()).device
    has_head = _has_head(student)
    names = ["next_token_loss", "entropy", *([*divergences, "token_agreement"] if teacher_targets else [])]
    sums, num_tokens = dict.fromkeys(names, 0.0), 0
    for batch in batches:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels, example_ids = batch["labels"], batch["example_ids"]
        inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
        inputs["mask"] = completion_mask(labels)
        tokens = labels[:, 1:][inputs["mask"]]
        num_tokens += len(tokens)
        rows = _targets(student, has_head, inputs)
        teacher_rows = teacher_targets(**inputs, example_ids=example_ids) if teacher_targets else None
        for start in range(0, len(tokens), ROWS):
            stop = min(start + ROWS, len(tokens))
            q = rows.logits(start, stop).log_softmax(dim=-1)
            sums["next_token_loss"] -= q.gather(-1, tokens[start:stop].unsqueeze(-1)).sum().item()
            sums["entropy"] += torch.special.entr(q.exp()).sum().item()
            if teacher_rows is None:
                continue
            p = teacher_rows.logits(start, stop).to(device).log_softmax(dim=-1)
            if isinstance(teacher_rows, TopKTargets) and teacher_rows.temperature != 1:
                q = (q / teacher_rows.temperature).log_softmax(dim=-1)
            for name, divergence in divergences.items():
                sums[name] += divergence(student=q, teacher=p).sum().item()
            sums["token_agreement"] += (q.argmax(dim=-1) == p.argmax(dim=-1)).sum().item()
            per_token(q, p)
    student.train(was_training)
    sums = summed(sums | {"num_tokens": num_tokens})
    total = int(sums.pop("num_tokens"))
    return {name: value / max(total, 1) for name, value in sums.items()} | {"num_tokens": total}


def _has_head(model: nn.Module) -> bool:
    try:
        check_head(model)
    except InputError:
        return False
    return True


def _targets(model: nn.Module, has_head: bool, inputs: dict[str, Any]) -> Targets:
    if not has_head:
        return DenseTargets(completion_logits(model, **inputs))
    return HiddenTargets(completion_hidden(model, **inputs), LMHead.read(model))
