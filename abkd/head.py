"""The output head: what it computes, read off a model, and its inputs and outputs at the tokens that count."""

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from abkd.errors import InputError
from abkd.packing import pack

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

    def to(self, device: torch.device | str) -> "LMHead":
        """The same on another device."""
        return replace(self, weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

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
        check_head(model)
        return cls.read(model)

    @classmethod
    def read(cls, model: nn.Module) -> "LMHead":
        """As `of`, without the check: for the weight and the bias that the model has now.

        Under FSDP2 for use after a forward of the whole model, on every rank: weight and bias are gathered where the
        forward left shards, and stay whole until FSDP's own backward has reduced their gradients with the others.
        """
        layer, config = _linear_head(model), unwrapped(model).config.get_text_config()
        _gather(layer, model)
        scale = 1.0
        for attribute, power in _SCALES.items():
            scale *= float(getattr(config, attribute, None) or 1.0) ** power
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(layer.weight, layer.bias, None if scale == 1.0 else scale, softcap)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Runs two tokens through `model` and refuses one whose logits are not those of `LMHead.read`.

    Leaves the model as it was. Under FSDP2 for all ranks at once, as every forward.

    Raises:
        InputError: as `LMHead.of`.
    """
    name, layer = type(unwrapped(model)).__name__, _linear_head(model)
    ids = torch.tensor([[0, 1]], device=layer.weight.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    was_training = model.training
    model.eval()
    expected = model(**batch).logits.float()
    with HeadInputs(model) as inputs:
        model(**batch)
    model.train(was_training)
    assert inputs.taken is not None
    head = LMHead.read(model)
    found = head.logits(inputs.taken)
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 3e-2
    for module in sharded(model):  # no backward will do it, and an optimizer made next must see the shards
        module.reshard()
    if found.shape != expected.shape or (found - expected).norm() > tolerance * expected.norm():
        raise InputError(
            f"{name} does more to its logits than a linear layer, a scale and a soft-cap of its config; {_DENSE}"
        )


def _linear_head(model: nn.Module) -> nn.Linear:
    inner = unwrapped(model)
    layer = inner.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        raise InputError(f"the output head of {type(inner).__name__} is a {kind}, not a linear layer; {_DENSE}")
    return layer


def _gather(layer: nn.Linear, model: nn.Module) -> None:
    """Makes the weights of `layer` whole where FSDP2 holds them in shards; refuses what else leaves them in pieces."""
    for innermost in [module for module in sharded(model) if layer in module.modules()][-1:]:
        innermost.unshard()
    in_pieces = hasattr(layer.weight, "full_tensor") or layer.weight.shape != (layer.out_features, layer.in_features)
    if in_pieces or any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        name = type(unwrapped(model)).__name__
        raise InputError(f"the output head of {name} is split over ranks, and not by fully_shard alone; {_DENSE}")


def sharded(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on, outer before inner."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


_DENSE = "set training.logits=dense"


class HeadInputs:
    """While open, `model` puts what its output head receives in `taken`, and its logits are `[batch, 0, vocab]`."""

    def __init__(self, model: nn.Module):
        self._layer = unwrapped(model).get_output_embeddings()
        self.taken: Tensor | None = None

    def __enter__(self) -> "HeadInputs":
        self._hooks = [
            self._layer.register_forward_pre_hook(self._take),
            self._layer.register_forward_hook(lambda layer, arguments, output: _NoGradient.apply(output)),
        ]
        return self

    def __exit__(self, *exception) -> None:
        for hook in self._hooks:
            hook.remove()

    def _take(self, layer: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        self.taken = arguments[0]
        return (arguments[0][:, :0],)


class _NoGradient(torch.autograd.Function):
    """The identity whose backward hands on nothing: the empty logits keep their graph, and cost no weight gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def completion_logits(
    model: nn.Module, *, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, packed: bool = False
) -> Tensor:
    """`model(input_ids, attention_mask).logits[:, :-1][mask]`, the head applied between the outermost counted columns.

    Args:
        model: a Hugging Face causal language model, or a distributed wrapper around one.
        input_ids, attention_mask: `[batch, length]`.
        mask: bool `[batch, length - 1]`; True at (b, t) counts the prediction of token t + 1.
        packed: the model reads the examples end to end (`abkd.packing`), which saves it the padding and changes no
            row; for a model that `check_packing` lets pass.

    Returns:
        `[num_tokens, vocab]`, row by row in the order of `mask`, differentiable, in the model's dtype.
        Without a counted token it is `[0, vocab]`, still attached to the graph.
    """
    logits, counted = _forward(model, input_ids, attention_mask, mask, packed)
    return logits[counted]


def completion_hidden(
    model: nn.Module, *, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, packed: bool = False
) -> Tensor:
    """What the output head receives where `completion_logits` has a row, `[num_tokens, hidden]`; no logits are made.

    Arguments and edges as `completion_logits`.
    """
    with HeadInputs(model) as inputs:
        logits, counted = _forward(model, input_ids, attention_mask, mask, packed)
    if inputs.taken is None:
        raise InputError(f"{type(unwrapped(model)).__name__} did not call its output head; {_DENSE}")
    return inputs.taken[counted] + logits.sum()  # 0: FSDP2 learns of the backward from what the model returned


def _forward(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, packed: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Logits, and row and column of those that count, in the order of `mask`.

    Only columns between the outermost counted ones are made where possible.
    """
    if packed:
        laid = pack(input_ids, attention_mask)
        inputs = {"input_ids": laid.input_ids, "position_ids": laid.position_ids, "use_cache": False}
        places, width = laid.places[:, :-1][mask], laid.input_ids.shape[1]
        rows, columns = places // width, places % width
    else:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        rows, columns = mask.nonzero(as_tuple=True)
    if len(columns) and "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters:
        first, last = torch.stack([columns.min(), columns.max()]).tolist()
        kept = torch.arange(first, last + 1, device=mask.device)
        return model(**inputs, logits_to_keep=kept).logits, (rows, columns - first)
    return model(**inputs).logits, (rows, columns)


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Runs three short examples through `model`, padded and packed; leaves it as it was.

    Raises:
        InputError: packed examples see each other in it, or it takes no position ids.
    """
    name, device = type(unwrapped(model)).__name__, next(model.parameters()).device
    attention_mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [1] * 3 + [0] * 3], device=device)
    input_ids = torch.arange(attention_mask.numel(), device=device).view_as(attention_mask)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    inputs["mask"] = attention_mask[:, 1:].bool()
    was_training = model.training
    model.eval()
    expected = completion_logits(model, **inputs)
    try:
        found = completion_logits(model, **inputs, packed=True)
    except TypeError as error:
        raise InputError(f"training.pack: {name} takes no position ids ({error}); set training.pack=false") from error
    finally:
        model.train(was_training)
    tolerance = 1e-4 if expected.dtype == torch.float32 else 3e-2
    if (found - expected).norm() > tolerance * expected.norm():
        raise InputError(f"training.pack: in {name} packed examples would see each other; set training.pack=false")


def unwrapped(model: nn.Module) -> Any:
    """The Hugging Face model inside a distributed, compiling or PEFT wrapper."""
    inner: Any = model
    while (within := getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)) is not None:
        inner = within
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner
