"""The output head: what it computes, read off a model, and its inputs and outputs at the tokens that count."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from abkd.errors import InputError

_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""Attribute of a Hugging Face config -> the power of it that multiplies the logits."""


@dataclass(frozen=True, eq=False)
class LMHead:
    """logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap); no tanh where softcap is None.

    Args:
        weight: `[vocab, hidden]`.
        bias: `[vocab]`.
        logit_scale: multiplies the logits before the soft-cap.
        softcap: > 0, bounds the logits to (-softcap, softcap).
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float | None = None
    softcap: float | None = None

    def __post_init__(self):
        if self.weight.dim() != 2:
            raise InputError(f"weight must be [vocab, hidden], got {tuple(self.weight.shape)}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise InputError(f"bias must be [vocab] = ({len(self.weight)},), got {tuple(self.bias.shape)}")
        if self.softcap is not None and not self.softcap > 0:
            raise InputError(f"softcap must be above 0, got {self.softcap!r}; None leaves it out")

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def tensors(self) -> list[Tensor]:
        """The weight, and the bias where there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., vocab]` of hidden states `[..., hidden]`, in fp32 at least, differentiable."""
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, self.weight.dtype), torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        return self.finish(nn.functional.linear(hidden.to(dtype), self.weight.to(dtype), bias))

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and soft-cap on the output of the matrix product."""
        if self.logit_scale is not None:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    @classmethod
    def of(cls, model: nn.Module) -> "LMHead":
        """The head of a Hugging Face causal language model; weight and bias are the model's own, tied or not.

        Checked against the model on two tokens, so that what the model does to its logits elsewhere is found.

        Raises:
            InputError: names the model and what in it cannot be represented.
        """
        inner = unwrapped(model)
        name, layer = type(inner).__name__, inner.get_output_embeddings()
        if not isinstance(layer, nn.Linear):
            raise InputError(f"the output head of {name} is a {type(layer).__name__}, not a linear layer; {_DENSE}")
        config = inner.config.get_text_config()
        scale = 1.0
        for attribute, power in _SCALES.items():
            scale *= float(getattr(config, attribute, None) or 1.0) ** power
        softcap = getattr(config, "final_logit_softcapping", None)
        head = cls(layer.weight, layer.bias, None if scale == 1.0 else scale, softcap)
        head._check(inner, name)
        return head

    @torch.no_grad()
    def _check(self, model: Any, name: str) -> None:
        ids = torch.tensor([[0, 1]], device=self.weight.device)
        was_training = model.training
        model.eval()
        with HeadInputs(model) as inputs:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
        model.train(was_training)
        assert inputs.taken is not None
        found = self.logits(inputs.taken)
        tolerance = 1e-4 if self.weight.dtype == torch.float32 else 3e-2
        if found.shape != expected.shape or (found - expected).norm() > tolerance * expected.norm():
            raise InputError(
                f"{name} does more to its logits than a linear layer, a scale and a soft-cap of its config; {_DENSE}"
            )


_DENSE = "set training.logits=dense"


class HeadInputs:
    """While open, `model` puts what its output head receives in `taken`, and its logits are `[batch, 0, vocab]`."""

    def __init__(self, model: nn.Module):
        self._layer = unwrapped(model).get_output_embeddings()
        self.taken: Tensor | None = None

    def __enter__(self) -> "HeadInputs":
        self._hook = self._layer.register_forward_pre_hook(self._take)
        return self

    def __exit__(self, *exception) -> None:
        self._hook.remove()

    def _take(self, layer: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        self.taken = arguments[0]
        return (arguments[0][:, :0],)


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
    logits, kept = _forward(model, input_ids, attention_mask, mask)
    return logits[kept]


def completion_hidden(model: nn.Module, *, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
    """What the output head receives where `completion_logits` has a row, `[num_tokens, hidden]`; no logits are made.

    Arguments and edges as `completion_logits`.
    """
    with HeadInputs(model) as inputs:
        _, kept = _forward(model, input_ids, attention_mask, mask)
    if inputs.taken is None:
        raise InputError(f"{type(unwrapped(model)).__name__} did not call its output head; {_DENSE}")
    return inputs.taken[kept]


def _forward(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the mask of their rows that count; only columns between the outermost counted ones where possible."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    columns = mask.any(dim=0).nonzero().squeeze(-1)
    if len(columns) and "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters:
        kept = torch.arange(int(columns[0]), int(columns[-1]) + 1, device=mask.device)
        return model(**inputs, logits_to_keep=kept).logits, mask[:, kept]
    return model(**inputs).logits, nn.functional.pad(mask, (0, 1))


def unwrapped(model: nn.Module) -> Any:
    """The model inside a distributed or compiling wrapper."""
    while (inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None)) is not None:
        model = inner
    return model
