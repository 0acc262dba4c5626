"""Output head and cross-entropy without the logits: `linear_loss` where there is no teacher."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from abkd.divergences import ForwardKL
from abkd.errors import InputError
from abkd.head import LMHead
from abkd.kernels.chunked import _autocast_dtype, chunk_rows
from abkd.kernels.sides import Side


class LinearCrossEntropy(NamedTuple):
    total: Tensor
    """Scalar, differentiable: sum_n weights[n] * CE[n]."""
    cross_entropy: Tensor
    """CE of the labels, `[N]`, detached, nats."""


@torch.compiler.disable
def linear_cross_entropy(
    hidden: Tensor, head: LMHead, labels: Tensor, *, weights: Tensor, rows: int | None = None
) -> LinearCrossEntropy:
    """CE = logsumexp(z) - z[label] with z = head.logits(hidden), and sum weights * CE; gradient in the forward.

    Args:
        hidden: `[N, hidden]`, what the head receives; fp32, bf16, fp16 or fp64.
        labels: `[N]`, int64, 0 to vocab - 1.
        weights: `[N]`, constants.
        rows: of logits held at once; chosen from shape and machine where None.

    Returns:
        fp32 at least. Without a token, zeros attached to the graph. A label at -inf costs inf.

    Raises:
        InputError: shapes or labels that do not fit.
    """
    if hidden.dim() != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise InputError(f"hidden must be [N, {head.weight.shape[1]}] for the head, got {tuple(hidden.shape)}")
    for name, value in (("labels", labels), ("weights", weights)):
        if value.shape != hidden.shape[:1]:
            raise InputError(f"{name} must be [N] = [{len(hidden)}], got {tuple(value.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < head.vocab:
        raise InputError(f"labels must lie between 0 and {head.vocab - 1}")
    rows = rows or chunk_rows(len(hidden), head, ForwardKL(), head.weight.device)
    autocast = _autocast_dtype(hidden.device.type)
    return LinearCrossEntropy(
        *_CrossEntropy.apply(head, labels, weights.detach(), rows, autocast, hidden, head.weight, head.bias)
    )


class _CrossEntropy(torch.autograd.Function):
    """Differentiable inputs: hidden, weight, bias."""

    @staticmethod
    def forward(
        ctx: Any,
        head: LMHead,
        labels: Tensor,
        weights: Tensor,
        rows: int,
        autocast: torch.dtype | None,
        *tensors: Tensor,
    ):
        hidden = tensors[0]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        weights = weights.to(dtype)
        values = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
            side = Side(hidden, head, ctx.needs_input_grad[-3:], rows, dtype, autocast)
            for start in range(0, len(hidden), rows):
                stop = min(start + rows, len(hidden))
                logits, label = side.logits(start, stop), labels[start:stop].unsqueeze(-1)
                logits.sub_(logits.amax(-1, keepdim=True))
                at_label = logits.gather(-1, label)
                sums = logits.exp_().sum(-1, keepdim=True)
                values[start:stop] = (sums.log() - at_label).squeeze(-1)
                weight = weights[start:stop].unsqueeze(-1)
                side.accumulate(start, stop, logits.mul_(weight / sums).scatter_add_(-1, label, -weight))
            ctx.save_for_backward(*side.gradients())
        ctx.mark_non_differentiable(values)
        ctx.set_materialize_grads(False)
        return (weights * values).sum(), values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *others: None):
        gradients = [None if x is None or grad is None else x * grad.to(x.dtype) for x in ctx.saved_tensors]
        return None, None, None, None, None, *gradients
