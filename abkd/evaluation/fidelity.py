"""How close a student is to its teacher on held-out completions."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from abkd.divergences import Divergence
from abkd.head import completion_logits
from abkd.objective import completion_mask


@torch.no_grad()
def fidelity(
    student: nn.Module,
    teacher_logits: Callable[..., Tensor] | None,
    batches: Iterable[Mapping[str, Tensor]],
    divergences: Mapping[str, Divergence],
    *,
    per_token: Callable[[Tensor, Tensor], None] = lambda student, teacher: None,
) -> dict[str, float]:
    """Means over the completion tokens of all batches; temperature 1.

    Args:
        teacher_logits: `InProcessTeacher.logits`, or any function of its signature; None where there is no teacher.
        batches: as the collator makes them.
        divergences: name -> divergence; each name is a key of the result.
        per_token: called with the log-probabilities of student and teacher, `[N, vocab]`, of every batch.

    Returns:
        `next_token_loss` (cross-entropy of the student with the data, nats per token) and `num_tokens`; with a teacher
        each divergence (nats per token) and `token_agreement` (share of tokens where both have the same most
        probable token, 0 to 1).
    """
    was_training = student.training
    student.eval()
    device = next(student.parameters()).device
    names = [*divergences, "token_agreement", "next_token_loss"] if teacher_logits else ["next_token_loss"]
    sums, num_tokens = dict.fromkeys(names, 0.0), 0
    for batch in batches:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels, example_ids = batch.pop("labels"), batch.pop("example_ids")
        batch["mask"] = completion_mask(labels)
        tokens = labels[:, 1:][batch["mask"]]
        q = completion_logits(student, **batch).float().log_softmax(dim=-1)
        sums["next_token_loss"] -= q.gather(-1, tokens.unsqueeze(-1)).sum().item()
        num_tokens += len(tokens)
        if teacher_logits is None:
            continue
        p = teacher_logits(**batch, example_ids=example_ids).to(device).float().log_softmax(dim=-1)
        for name, divergence in divergences.items():
            sums[name] += divergence(student=q, teacher=p).sum().item()
        sums["token_agreement"] += (q.argmax(dim=-1) == p.argmax(dim=-1)).sum().item()
        per_token(q, p)
    student.train(was_training)
    return {name: total / max(num_tokens, 1) for name, total in sums.items()} | {"num_tokens": num_tokens}
