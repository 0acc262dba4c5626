"""The output head: from hidden states to logits, at the tokens that count and nowhere else."""

import inspect

import torch
from torch import Tensor, nn


def completion_logits(model: nn.Module, *, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
    """`model(input_ids, attention_mask).logits[:, :-1][mask]`, the head applied between the outermost counted columns.

    Args:
        model: a Hugging Face causal language model, or a distributed wrapper around one.
        input_ids, attention_mask: `[batch, length]`.
        mask: bool `[batch, length - 1]`; True at (b, t) counts the prediction of token t + 1.

    Returns:
        `[num_tokens, vocab]`, row by row in the order of `mask`, differentiable, in the model's dtype.
        Without a counted token it is `[0, vocab]`, still attached to the graph.
    """
    unwrapped = getattr(model, "module", model)
    columns = mask.any(dim=0).nonzero().squeeze(-1)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if len(columns) and "logits_to_keep" in inspect.signature(unwrapped.forward).parameters:
        kept = torch.arange(int(columns[0]), int(columns[-1]) + 1, device=mask.device)
        return model(**inputs, logits_to_keep=kept).logits[mask[:, kept]]
    return model(**inputs).logits[:, :-1][mask]
