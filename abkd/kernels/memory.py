"""What one training step will need at its peak, before it starts.

Which tensors live when follows from shapes alone: the models' own modules run forward and backward on tensors that hold
no memory, and every storage is counted from its birth to its end.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from abkd.divergences import Divergence
from abkd.head import LMHead, unwrapped
from abkd.kernels.chunked import workspace_bytes

_SAMPLE = 256, 4096  # rows and classes of the small batch on which a dense loss is measured


@dataclass(frozen=True)
class Step:
    """One micro-batch, as it decides memory.

    Args:
        batch_size, length: examples, and tokens of each, padding included.
        num_tokens: counted ones of the batch, at most batch_size * length.
        loss: what compares the logits; a divergence is done by the kernels, without logits; anything else is a function
            of (student_logits, teacher_logits, labels) `[N, vocab]`, `[N, vocab]`, `[N]` that gets all of them.
        autocast: of the student's forward; None without.
        accumulates: earlier micro-batches have left gradients.
        device: where the step will run.
    """

    batch_size: int
    length: int
    num_tokens: int
    loss: Divergence | Callable[[Tensor, Tensor, Tensor], Tensor]
    autocast: torch.dtype | None = None
    accumulates: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device; the parts are never all there at once, so that `peak` is less than their sum."""

    peak: int
    student: int
    """Weights."""
    teacher: int
    """Weights."""
    optimizer: int
    """Adam's two moments of what is trained."""
    gradients: int
    activations: int
    """What the student's forward keeps for its backward."""
    loss: int
    """Logits and what is made of them, at their most."""

    def __str__(self) -> str:
        parts = ("student", "teacher", "optimizer", "gradients", "activations", "loss")
        described = ", ".join(f"{name} {getattr(self, name) / 2**30:.2f}" for name in parts)
        return f"{self.peak / 2**30:.2f} GiB at its peak ({described})"


def step_memory(make_models: Callable[[], tuple[nn.Module, nn.Module | None]], step: Step) -> StepMemory:
    """The memory of `step` with AdamW, once its moments exist, in one process without sharding.

    Args:
        make_models: builds (student, teacher or None), causal language models of Hugging Face, on the CPU. It is called
            where no tensor holds memory; a model is frozen, and its activations are checkpointed, as it says itself.

    Not counted: the libraries themselves (about half a GiB), batches that wait, the gradient buckets of DDP.
    """
    with FakeTensorMode(), torch.device("cpu"):
        student, teacher = make_models()
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        models = {"student": student, "teacher": teacher or nn.Identity()}
        weights = {name: _bytes([*model.parameters(), *model.buffers()]) for name, model in models.items()}
        optimizer = 2 * _bytes(trained)
        with LiveBytes() as live:
            if step.accumulates:
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
            activations, loss = _take(step, student, teacher, live)
        return StepMemory(
            peak=sum(weights.values()) + optimizer + live.peak,
            **weights,
            optimizer=optimizer,
            gradients=_bytes(trained),
            activations=activations,
            loss=loss,
        )


def _take(step: Step, student: Any, teacher: Any, live: "LiveBytes") -> tuple[int, int]:
    """Forward and backward; bytes of activations and of the loss."""
    ids = torch.zeros(step.batch_size, step.length, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    fused = isinstance(step.loss, Divergence)
    with torch.autocast("cpu", dtype=step.autocast, enabled=step.autocast is not None):
        targets = torch.empty(0)
        if teacher is not None:
            with torch.no_grad():
                targets = _rows(teacher, teacher.base_model(**inputs).last_hidden_state, step, fused)
        before = live.now
        hidden = student.base_model(**inputs).last_hidden_state
        activations = live.now - before
        rows = _rows(student, hidden, step, fused)
        loss = _loss_bytes(step, _head(student).weight)
        total = _Loss.apply(loss, rows, *(_head(student).parameters() if fused else ()))
        logits = 0 if fused else _bytes([rows, targets])
    del hidden, rows, targets
    total.backward()
    return activations, loss + logits


def _rows(model: Any, hidden: Tensor, step: Step, fused: bool) -> Tensor:
    """What the loss gets of a model at the counted tokens: hidden states, or logits out of those of all tokens."""
    everything = hidden if fused else _head(model)(hidden)
    return everything.flatten(0, 1)[: step.num_tokens].clone()


def _head(model: Any) -> Any:
    return unwrapped(model).get_output_embeddings()


class _Loss(torch.autograd.Function):
    """Takes so many bytes for a moment, and keeps the gradients of its inputs until the backward, as the kernels do."""

    @staticmethod
    def forward(ctx: Any, num_bytes: int, *tensors: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[1:]
        gradients = [torch.empty_like(x) if need else None for x, need in zip(tensors, needed, strict=True)]
        torch.empty(num_bytes, dtype=torch.uint8)
        ctx.save_for_backward(*gradients)
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return None, *ctx.saved_tensors


def _loss_bytes(step: Step, weight: Tensor) -> int:
    """Besides inputs and their gradients."""
    if isinstance(step.loss, Divergence):
        in_triton = step.device.type == "cuda"
        return workspace_bytes(step.num_tokens, LMHead(weight), step.loss, step.device, in_triton)
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        return _dense_loss_bytes(step.loss, step.num_tokens * len(weight), step.device)


def _dense_loss_bytes(loss: Callable[[Tensor, Tensor, Tensor], Tensor], numbers: int, device: torch.device) -> int:
    """Of logits of so many numbers, from what two small batches need.

    On a CPU part of it does not grow: `alpha_beta` works there in blocks, of which the small batch fills one.
    """
    rows, classes = _SAMPLE
    one, two = _measured(loss, rows, classes), _measured(loss, 2 * rows, classes)
    sample = rows * classes
    if device.type != "cpu" or numbers <= sample:
        return one * numbers // sample
    return one + (two - one) * (numbers - sample) // sample


def _measured(loss: Callable[[Tensor, Tensor, Tensor], Tensor], rows: int, classes: int) -> int:
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, rows, classes, generator=generator)
    student.requires_grad_()
    with LiveBytes() as live:
        loss(student, teacher, torch.arange(rows)).backward()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """While open, counts the bytes of all tensors made in this thread: `now`, and `peak`, those most at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in given:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, lambda _: self._drop(key, num_bytes))
        self.now += num_bytes
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, num_bytes: int) -> None:
        del self._storages[key]
        self.now -= num_bytes


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each once."""
    return sum({id(x.untyped_storage()): x.untyped_storage().nbytes() for x in tensors}.values())
