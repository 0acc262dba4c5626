"""Value and gradient chunk by chunk in the forward: no logits outlive their chunk; docs/kernels.md derives it."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from abkd.divergences import AlphaBeta, Divergence, ForwardKL, ReverseKL
from abkd.divergences.top_k import Kept
from abkd.errors import InputError
from abkd.head import LMHead
from abkd.kernels import native
from abkd.kernels.kept import kept_rows, why_reduced
from abkd.kernels.reference import LinearLoss, Problem, entropy
from abkd.kernels.sides import MadeRows, Rows, Side
from abkd.targets import DenseTargets, HiddenTargets, MixtureTargets, TopKTargets

_BLOCK = 2**18  # elements of a temporary of the torch step, on a CPU


class Step(NamedTuple):
    """One chunk of rows; the gradients are those of its weighted sum with respect to the logits."""

    divergence: Tensor
    entropy: Tensor
    cross_entropy: Tensor
    student_grad: Tensor
    teacher_grad: Tensor | None


@dataclass(frozen=True, eq=False)
class Chunk:
    """What a step gets: rows of logits, which it may write over, and what to make of them."""

    student: Tensor
    teacher: Tensor
    weights: Tensor
    ce_weights: Tensor | None
    labels: Tensor | None
    divergence: Divergence
    temperature: float
    teacher_temperature: float
    teacher_needs_grad: bool
    group: dist.ProcessGroup | None = None
    """Each of its ranks has some of the columns."""
    first_class: int = 0
    """The class of the first column."""
    gradient_dtype: torch.dtype = torch.float32
    """What the products of the gradient take; a step may give a wider one."""
    kept: Kept | None = None
    """Of the teacher, where that is all there is: `teacher` then has no columns."""

    def reduce(self, tensor: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
        """`tensor`, in place, over all columns."""
        if self.group is not None:
            dist.all_reduce(tensor, operation, group=self.group)
        return tensor


def chunked_loss(
    problem: Problem, rows: int | None = None, group: dist.ProcessGroup | None = None, in_triton: bool = False
) -> LinearLoss:
    """`rows` per chunk, chosen from shape and machine where None; `group` as in `abkd.kernels.linear_loss`.

    `in_triton`: the elementwise work, where `why_not_triton` has nothing against it.
    """
    head, targets = problem.head, problem.targets
    rows, first_class = (
        rows or chunk_rows(len(problem.hidden), head, problem.divergence, head.weight.device, in_triton),
        0,
    )
    if group is not None:
        rows, first_class = _agree(rows, head, group)
    teacher_tensors = [*targets.tensors, None, None, None][:3]
    plan = _Plan(problem, rows, group, first_class, in_triton, _autocast_dtype(problem.hidden.device.type))
    return LinearLoss(*_Chunked.apply(plan, problem.hidden, head.weight, head.bias, *teacher_tensors))


def chunk_rows(
    num_rows: int, head: LMHead, divergence: Divergence, device: torch.device, in_triton: bool = False
) -> int:
    """Rows of logits per chunk: as many as fit into a share of the memory that is free, in steps of 8."""
    budget = 120 * 2**20  # larger chunks do not make a CPU's matrix products faster
    if device.type == "cuda":
        budget = min(torch.cuda.mem_get_info(device)[0] // 8, 2**31)
    rows = budget // (4 * _buffers(head, divergence, device, in_triton) * head.vocab)
    return max(8, min(rows // 8 * 8, num_rows))


def workspace_bytes(
    num_rows: int, head: LMHead, divergence: Divergence, device: torch.device, in_triton: bool = False
) -> int:
    """What a loss of `num_rows` tokens takes besides its inputs and their gradients."""
    rows = chunk_rows(num_rows, head, divergence, device, in_triton)
    in_fp32 = head.weight.numel() if head.weight.requires_grad and head.weight.dtype != torch.float32 else 0
    return 4 * (rows * head.vocab * _buffers(head, divergence, device, in_triton) + in_fp32)


def _buffers(head: LMHead, divergence: Divergence, device: torch.device, in_triton: bool) -> int:
    """fp32 numbers per logit of a chunk: both models' logits, and what the step makes of them."""
    in_place = exponents(divergence) is not None and device.type == "cpu"
    return 2 + (head.softcap is not None) + (1 if in_triton else 0 if in_place else 6)


def _agree(rows: int, head: LMHead, group: dist.ProcessGroup) -> tuple[int, int]:
    """The fewest rows that a rank of the group asks for, and the first class of this rank's columns."""
    own = torch.tensor([rows, head.vocab], device=head.weight.device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    before = everyone[: dist.get_rank(group)]
    return min(int(theirs[0]) for theirs in everyone), sum(int(theirs[1]) for theirs in before)


def exponents(divergence: Divergence) -> tuple[float, float] | None:
    """(alpha, beta) where the divergence is a point of the plane off the line alpha + beta = 0."""
    match divergence:
        case ForwardKL():
            return 1.0, 0.0
        case ReverseKL():
            return 0.0, 1.0
        case AlphaBeta(alpha=alpha, beta=beta) if abs(alpha + beta) > 0.05:
            return alpha, beta
    return None


@dataclass(frozen=True, eq=False)
class _Plan:
    problem: Problem
    rows: int
    group: dist.ProcessGroup | None
    first_class: int
    in_triton: bool
    autocast: torch.dtype | None


def _autocast_dtype(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class _Chunked(torch.autograd.Function):
    """Inputs after the plan: student hidden, weight, bias; teacher logits or hidden, weight, bias."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor | None):
        needed = ctx.needs_input_grad[1:]
        with torch.autocast(tensors[0].device.type, enabled=False), torch.no_grad():  # type: ignore[union-attr]
            values, gradients = _run(plan, tensors, needed)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*values[1:])
        ctx.set_materialize_grads(False)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *others: None):
        gradients = ctx.saved_tensors
        if grad is None:
            return (None,) * (1 + len(gradients))
        if grad != 1:  # the usual factor costs no copy
            gradients = [None if x is None else x * grad.to(x.dtype) for x in gradients]
        return None, *gradients


def _run(plan: _Plan, tensors, needed) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    hidden, teacher = tensors[0], tensors[3]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    num_rows = len(hidden)
    student_side = Side(hidden, plan.problem.head, needed[:3], plan.rows, dtype, plan.autocast)
    teacher_side: Side | Rows | MadeRows
    match plan.problem.targets:
        case DenseTargets():
            teacher_side = Rows(teacher, needed[3], dtype)
        case HiddenTargets(head=head):
            teacher_side = Side(teacher, head, needed[3:], plan.rows, dtype, plan.autocast)
        case TopKTargets() | MixtureTargets() as targets:
            teacher_side = MadeRows(targets, plan.problem.divergence, dtype)
    divergence, entropies, cross_entropy = (torch.zeros(num_rows, dtype=dtype, device=hidden.device) for _ in range(3))
    step = _choose_step(plan, dtype, hidden.device, teacher_needs_grad=any(needed[3:]))
    for start in range(0, num_rows, plan.rows):
        stop = min(start + plan.rows, num_rows)

        def chunk(start=start, stop=stop):
            return Chunk(
                student_side.logits(start, stop),
                teacher_side.logits(start, stop),
                plan.problem.token_weights[start:stop].to(dtype),
                None if plan.problem.ce_weights is None else plan.problem.ce_weights[start:stop].to(dtype),
                None if plan.problem.labels is None else plan.problem.labels[start:stop],
                plan.problem.divergence,
                plan.problem.temperature,
                plan.problem.teacher_temperature,
                any(needed[3:]),
                plan.group,
                plan.first_class,
                student_side.gradient_dtype,
                teacher_side.kept(start, stop) if isinstance(teacher_side, MadeRows) else None,
            )

        done = step(chunk())
        if done is None and plan.group is not None:
            raise InputError("group: a logit is -inf or a power overflows, which a split vocabulary cannot take")
        done = done or autograd_step(chunk())
        divergence[start:stop], entropies[start:stop] = done.divergence, done.entropy
        cross_entropy[start:stop] = done.cross_entropy
        student_side.accumulate(start, stop, done.student_grad)
        if done.teacher_grad is not None and not isinstance(teacher_side, MadeRows):
            teacher_side.accumulate(start, stop, done.teacher_grad)
    total = (plan.problem.token_weights.to(dtype) * divergence).sum()
    if plan.problem.ce_weights is not None:
        total = total + (plan.problem.ce_weights.to(dtype) * cross_entropy).sum()
    if plan.group is not None and student_side.hidden_grad is not None:
        dist.all_reduce(student_side.hidden_grad, group=plan.group)
    gradients = [*student_side.gradients(), *teacher_side.gradients()]
    return (total, divergence, entropies, cross_entropy), gradients


def _choose_step(
    plan: _Plan, dtype: torch.dtype, device: torch.device, teacher_needs_grad: bool
) -> Callable[[Chunk], Step | None]:
    by_autograd = exponents(plan.problem.divergence) is None or teacher_needs_grad
    by_autograd = by_autograd or (plan.problem.ce_weights is not None and plan.problem.temperature != 1)
    if plan.group is not None:
        if by_autograd:
            raise InputError(
                "group: a split vocabulary takes the alpha-beta family off alpha + beta = 0, without a gradient of the "
                f"teacher, and a cross-entropy only at temperature 1; got {plan.problem.divergence!r}"
            )
        return torch_step
    if why_reduced(plan.problem.targets, plan.problem.divergence):
        return top_k_step
    if plan.in_triton:
        return triton_step
    if by_autograd:
        return autograd_step
    if device.type == "cpu" and dtype == torch.float32 and not isinstance(native.library(), str):
        return native_step
    return torch_step


def why_not_triton(problem: Problem, group: dist.ProcessGroup | None) -> str:
    """Why the elementwise work cannot be done in Triton, in a few words; empty where it can."""
    targets, device = problem.targets, problem.hidden.device.type
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a GPU, and the tensors are on {device}"
    if reason := why_reduced(targets, problem.divergence):
        return reason
    from abkd.kernels.triton import local_divergence

    try:
        local_divergence(problem.divergence)
    except ValueError as kind:
        return f"it has no {kind}"
    if torch.promote_types(problem.hidden.dtype, torch.float32) == torch.float64:
        return "it computes in fp32, and the hidden states are fp64"
    if group is not None:
        return "it takes no split vocabulary"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in targets.tensors):
        return "it gives no gradient of the teacher"
    return ""


def triton_step(chunk: Chunk) -> Step | None:
    """The alpha-beta family and the mixtures on a GPU; None where a row needs the limits."""
    from abkd.kernels.triton import divergence_rows

    same = chunk.gradient_dtype == chunk.student.dtype
    gradient = chunk.student if same else torch.empty_like(chunk.student, dtype=chunk.gradient_dtype)
    values = divergence_rows(
        chunk.student,
        chunk.teacher,
        chunk.weights.contiguous(),
        None if chunk.ce_weights is None else chunk.ce_weights.contiguous(),
        None if chunk.ce_weights is None or chunk.labels is None else chunk.labels.contiguous(),
        chunk.divergence,
        temperature=chunk.temperature,
        teacher_temperature=chunk.teacher_temperature,
        gradient=gradient,
    )
    return Step(values[0], values[1], values[2], gradient, None) if bool(values.isfinite().all()) else None


def native_step(chunk: Chunk) -> Step | None:
    """The alpha-beta family in C; None where a row needs the limits."""
    alpha, beta = exponents(chunk.divergence) or (1.0, 0.0)
    done = native.alpha_beta_rows(
        chunk.student,
        chunk.teacher,
        chunk.weights.contiguous(),
        None if chunk.ce_weights is None else chunk.ce_weights.contiguous(),
        None if chunk.labels is None or chunk.ce_weights is None else chunk.labels.contiguous(),
        alpha=alpha,
        beta=beta,
        student_scale=1 / chunk.temperature,
        teacher_scale=1 / chunk.teacher_temperature,
    )
    return None if done is None else Step(*done, chunk.student, None)


def torch_step(chunk: Chunk) -> Step | None:
    """The alpha-beta family in torch, in place, by blocks that stay in cache; None where a row needs the limits."""
    lowest = chunk.reduce(torch.minimum(chunk.student.amin(), chunk.teacher.amin()), dist.ReduceOp.MIN)
    if not bool(lowest > -torch.inf):
        return None
    alpha, beta = exponents(chunk.divergence) or (1.0, 0.0)
    num_rows, vocab = chunk.student.shape
    values = torch.zeros(3, num_rows, dtype=chunk.student.dtype, device=chunk.student.device)
    block = max(1, _BLOCK // vocab) if chunk.student.device.type == "cpu" else num_rows
    for start in range(0, num_rows, block):
        rows = slice(start, start + block)
        log_q, log_p = chunk.student[rows], chunk.teacher[rows]
        cross = None
        if chunk.ce_weights is not None and chunk.labels is not None:  # at temperature 1
            label = chunk.labels[rows].unsqueeze(-1) - chunk.first_class
            is_here = (label >= 0) & (label < vocab)
            cross = label.clamp(0, vocab - 1), is_here, chunk.ce_weights[rows].unsqueeze(-1)
        for logits, temperature in ((log_q, chunk.temperature), (log_p, chunk.teacher_temperature)):
            logits.div_(temperature).sub_(chunk.reduce(logits.amax(-1, keepdim=True), dist.ReduceOp.MAX))
            logits.sub_(chunk.reduce(logits.exp().sum(-1, keepdim=True)).log_())
        u = log_p - log_q
        mixed = (alpha * log_p).add_(log_q, alpha=beta)
        w = _power_difference(u, (alpha + beta) * log_q, mixed, alpha)  # q^beta (p^alpha - q^alpha) / alpha
        v = _power_difference(u, log_p.mul_(alpha + beta), mixed, beta)  # p^alpha (p^beta - q^beta) / beta
        values[0, rows] = v.sub_(w).sum(-1).div_(alpha + beta)
        q = log_q.exp()
        values[1, rows] = -torch.linalg.vecdot(q, log_q)
        scale = chunk.weights[rows].unsqueeze(-1) / chunk.temperature
        on_q = chunk.reduce(w.sum(-1, keepdim=True)) * scale
        if cross is not None:
            label, is_here, ce_weight = cross
            values[2, rows] = -(log_q.gather(-1, label) * is_here).squeeze(-1)
            on_q = on_q + ce_weight
        torch.mul(q, on_q, out=log_q).sub_(w.mul_(scale))
        if cross is not None:
            log_q.scatter_add_(-1, label, -ce_weight * is_here)
    chunk.reduce(values)
    if not bool(values[0].isfinite().all()):
        return None
    return Step(values[0], values[1], values[2], chunk.student, None)


def top_k_step(chunk: Chunk) -> Step:
    """Any divergence from k classes of the teacher and its rest."""
    assert chunk.kept is not None
    values = kept_rows(
        chunk.student,
        chunk.kept,
        chunk.weights,
        chunk.ce_weights,
        chunk.labels,
        divergence=chunk.divergence,
        temperature=chunk.temperature,
    )
    return Step(values[0], values[1], values[2], chunk.student, None)


def _power_difference(u: Tensor, own: Tensor, mixed: Tensor, exponent: float) -> Tensor:
    """sign(u) e^max(own, mixed) (1 - e^-|exponent u|) / |exponent|; writes over `own`."""
    size = max(abs(exponent), 1e-20)
    top = torch.maximum(own, mixed, out=own).exp_()
    return top.mul_(torch.expm1((u * -size).abs_().neg_())).mul_(torch.sign(u)).div_(-size)


def autograd_step(chunk: Chunk) -> Step:
    """Any divergence, any edge: autograd inside the chunk."""
    with torch.enable_grad():
        student = chunk.student.detach().requires_grad_()
        teacher = chunk.teacher.detach().requires_grad_(chunk.teacher_needs_grad)
        log_q = torch.log_softmax(student / chunk.temperature, dim=-1)
        log_p = torch.log_softmax(teacher / chunk.teacher_temperature, dim=-1)
        values = chunk.divergence(student=log_q, teacher=log_p)
        total, cross_entropy = (chunk.weights * values).sum(), torch.zeros_like(values)
        if chunk.ce_weights is not None and chunk.labels is not None:
            cross_entropy = torch.nn.functional.cross_entropy(student, chunk.labels, reduction="none")
            total = total + (chunk.ce_weights * cross_entropy).sum()
        inputs = [student, teacher] if chunk.teacher_needs_grad else [student]
        gradients = torch.autograd.grad(total, inputs)
    return Step(values.detach(), entropy(log_q.detach()), cross_entropy.detach(), gradients[0], (*gradients, None)[1])
