"""The alpha-beta-divergence: value and gradients, in logarithms, for every real (alpha, beta).

p is the teacher, q the student, u = ln p - ln q, s = alpha + beta, k runs over the vocabulary.
With exp[x0, .., xn] the n-th divided difference of exp, and the nodes

    x0 = ln q^s = s ln q,    x1 = ln p^alpha q^beta = x0 + alpha u,    x2 = ln p^s = x0 + s u,

the divergence is D = sum_k u^2 exp[x0, x1, x2]                                              (1)
and with w_k = u exp[x0, x1] = q^beta (p^alpha - q^alpha) / alpha                            (2)
its gradients are dD/d ln q_k = -w_k, and dD/d ln p_k = -w_k with the roles exchanged:
D^(alpha,beta)(p||q) = D^(beta,alpha)(q||p)                                                  (3)

exp[...] is entire, so alpha = 0, beta = 0 and alpha + beta = 0 are ordinary points.
The derivation is in docs/divergences.md.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from abkd.errors import InputError

_SERIES_RANGE = 1.0  # nodes closer together than this are summed as a power series in u
_TINY_EXPONENT = 1e-20  # below it (p^a - q^a)/a is ln p - ln q to rounding, for any finite logs
_TINY_GAP = 1e-30  # (1 - e^-gap) / gap is 1 to rounding there, and not yet 0/0
_BLOCK_ELEMENTS = 2**20  # temporaries of one block stay in a CPU's last cache; see docs/decisions.md


def alpha_beta(*, student: Tensor, teacher: Tensor, alpha: float, beta: float) -> Tensor:
    """-1/(alpha beta) * sum_k [p^alpha q^beta - alpha/s p^s - beta/s q^s], s = alpha + beta, and its limits.

    Args:
        student: log-probabilities ln q, `[..., vocab]`.
        teacher: log-probabilities ln p, same shape.
        alpha: hardness-concentration, any finite real; smaller chases large errors harder.
        beta: confidence-concentration, any finite real; larger trusts the student's confidence more.

    Returns:
        `[...]`, nats for normalised rows, >= 0, exactly 0 at p = q; fp32 at least, whatever the inputs.
        Differentiable once in `student` and in `teacher`, by the closed form.

    Edges:
        A class at -inf in both rows adds exactly 0 to value and gradient. At -inf in one row the
        limit is returned: q = 0 < p is finite when beta > 0 and s > 0, p = 0 < q when alpha > 0 and
        s > 0, both are `+inf` otherwise (forward KL at q = 0). The gradient is never NaN: a class
        whose gradient grows without bound, or overflows, adds nothing to it, and the value is then
        `+inf`, so the step is visible. NaN in gives NaN out.

    Raises:
        InputError: alpha or beta is not a finite number; the shapes differ.

    Source: Wang et al., "ABKD", ICML 2025, Def. 4.1 and App. B, Eq. 8; gradient: Eq. 132.
        Cichocki, Cruces and Amari, "Generalized alpha-beta divergences", Entropy 13(1), 2011.
    """
    alpha, beta = _finite("alpha", alpha), _finite("beta", beta)
    if student.shape != teacher.shape:
        raise InputError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape [..., vocab]"
        )
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return _AlphaBeta.apply(student.to(dtype), teacher.to(dtype), alpha, beta)


def forward_kl(*, student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) = sum_k p (ln p - ln q): `alpha_beta` at (1, 0). Shapes and edges as there.

    Source: Kullback and Leibler, 1951; as a distillation loss: Hinton et al., arXiv 1503.02531.
    """
    return alpha_beta(student=student, teacher=teacher, alpha=1.0, beta=0.0)


def reverse_kl(*, student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) = sum_k q (ln q - ln p): `alpha_beta` at (0, 1). Shapes and edges as there.

    Source: Kullback and Leibler, 1951; as a distillation loss: Gu et al., "MiniLLM", ICLR 2024.
    """
    return alpha_beta(student=student, teacher=teacher, alpha=0.0, beta=1.0)


class _AlphaBeta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, alpha: float, beta: float) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.exponents = alpha, beta
        return _by_blocks(lambda q, p: _class_values(q, p, alpha, beta).sum(-1), student, teacher, student.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        student, teacher = ctx.saved_tensors
        alpha, beta = ctx.exponents
        student_grad = teacher_grad = None
        if ctx.needs_input_grad[0]:
            weights = _by_blocks(lambda q, p: _class_weights(q, p, alpha, beta), student, teacher, student.shape)
            student_grad = weights.mul_(-grad.unsqueeze(-1))
        if ctx.needs_input_grad[1]:  # (3)
            weights = _by_blocks(lambda p, q: _class_weights(p, q, beta, alpha), teacher, student, teacher.shape)
            teacher_grad = weights.mul_(-grad.unsqueeze(-1))
        return student_grad, teacher_grad, None, None


def _class_values(student: Tensor, teacher: Tensor, alpha: float, beta: float) -> Tensor:
    """(1) per class with its limits at probability 0, `[rows, vocab]`."""
    if _all_finite(student, teacher):
        return _finite_values(student, teacher, alpha, beta)
    student, teacher, student_only, teacher_only = _set_zeros_apart(student, teacher)
    value = _finite_values(student, teacher, alpha, beta)
    value = torch.where(student_only, _value_at_zero(teacher, beta, alpha + beta), value)
    return torch.where(teacher_only, _value_at_zero(student, alpha, alpha + beta), value)


def _class_weights(student: Tensor, teacher: Tensor, alpha: float, beta: float) -> Tensor:
    """(2) per class with its limits at probability 0, `[rows, vocab]`, never infinite."""
    if _all_finite(student, teacher):
        weights = _finite_weights(student, teacher, alpha, beta)
        return weights.masked_fill_(weights.isinf(), 0.0)
    s = alpha + beta
    student, teacher, student_only, teacher_only = _set_zeros_apart(student, teacher)
    weights = _finite_weights(student, teacher, alpha, beta)
    if beta == 0 and alpha > 0:  # the limits at q = 0 that are not 0; where there is none, see alpha_beta
        weights = torch.where(student_only, (alpha * teacher).exp_().div_(alpha), weights)
    elif s == 0 and beta > 0:
        weights = weights.masked_fill(student_only, 1 / beta)
    if alpha > 0:  # the limit at p = 0
        weights = torch.where(teacher_only, (s * student).exp_().div_(-alpha), weights)
    return weights.masked_fill_(weights.isinf(), 0.0)


def _finite_values(student: Tensor, teacher: Tensor, alpha: float, beta: float) -> Tensor:
    """u^2 exp[x0, x1, x2] (1) of finite logarithms."""
    s = alpha + beta
    u = teacher - student
    low, middle, high = sorted((0.0, alpha, s))  # the nodes are (s - offset) ln q + offset ln p, so ordered or reversed
    value = _series(u, alpha, s).mul_((s * student).exp_())
    if high > low:
        up, down = u.clamp(min=0), (-u).clamp_(min=0)
        top_gap = up * (high - middle) + down * (middle - low)
        low_gap = up.mul_(middle - low).add_(down, alpha=high - middle)
        top = torch.maximum(*((s - offset) * student + offset * teacher for offset in (low, high))).exp_()
        slopes = _exp_ratio(top_gap).sub_(_exp_ratio(low_gap).mul_((-top_gap).exp_()))
        far = slopes.mul_(top).div_(top_gap.add_(low_gap))
        value = torch.where(u.abs() * (high - low) > _SERIES_RANGE, far, value)
    return value.mul_(u).mul_(u)


def _finite_weights(student: Tensor, teacher: Tensor, alpha: float, beta: float) -> Tensor:
    """u exp[x0, x1] (2) of finite logarithms: sign(u) e^max(x0, x1) (1 - e^-|alpha u|) / |alpha|."""
    u = teacher - student
    top = torch.maximum((alpha + beta) * student, alpha * teacher + beta * student).exp_()
    if abs(alpha) < _TINY_EXPONENT:
        return top.mul_(u)
    return top.mul_(torch.expm1(-(alpha * u).abs_())).mul_(torch.sign(u)).div_(-abs(alpha))


def _all_finite(student: Tensor, teacher: Tensor) -> bool:
    """No -inf and no NaN."""
    return student.numel() > 0 and bool(torch.minimum(student.amin(), teacher.amin()) > -math.inf)


def _set_zeros_apart(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(student, teacher, student_only, teacher_only): pairs with a -inf become equal finite logs, so that u = 0 there.

    The masks mark the classes at -inf in one row alone; the other row keeps its logarithm.
    """
    student_zero, teacher_zero = student.isneginf(), teacher.isneginf()
    student_only, teacher_only = student_zero & ~teacher_zero, teacher_zero & ~student_zero
    both = student_zero & teacher_zero
    return (
        torch.where(student_only, teacher, student).masked_fill_(both, 0.0),
        torch.where(teacher_only, student, teacher).masked_fill_(both, 0.0),
        student_only,
        teacher_only,
    )


def _value_at_zero(log_other: Tensor, exponent: float, s: float) -> Tensor:
    """One class's value where one probability is 0: other^s / (s * exponent), exponent that of the 0."""
    if exponent > 0 and s > 0:
        return (s * log_other).exp_().div_(s * exponent)
    return torch.full_like(log_other, math.inf)


def _series(u: Tensor, alpha: float, s: float) -> Tensor:
    """exp[0, alpha u, s u] = sum_n h_n(alpha, s) u^n / (n + 2)! where its arguments are at most 1; h_n: see docs."""
    num_terms = 13 if u.dtype == torch.float32 else 20
    coefficients, homogeneous, factorial = [], 1.0, 2.0
    for n in range(num_terms):
        coefficients.append(homogeneous / factorial)
        homogeneous = s * homogeneous + alpha ** (n + 1)
        factorial *= n + 3
    total = torch.full_like(u, coefficients.pop())
    while coefficients:
        total.mul_(u).add_(coefficients.pop())
    return total


def _exp_ratio(gap: Tensor) -> Tensor:
    """exp[0, -gap] = (1 - e^-gap) / gap for gap >= 0, 1 at 0."""
    negative = gap.clamp(min=_TINY_GAP).neg_()
    return torch.expm1(negative).div_(negative)


def _by_blocks(
    function: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor, shape: torch.Size
) -> Tensor:
    """`function` of `[rows, vocab]` blocks of the inputs, gathered in a tensor of `shape`."""
    result = torch.empty(shape, dtype=first.dtype, device=first.device)
    if first.numel() == 0:
        return result.zero_()
    vocab = first.shape[-1]
    num_rows = first.numel() // vocab
    rows = max(1, _BLOCK_ELEMENTS // vocab) if first.device.type == "cpu" else num_rows
    blocks = (tensor.reshape(num_rows, -1).split(rows) for tensor in (result, first, second))
    for out, *inputs in zip(*blocks, strict=True):
        out.copy_(function(*inputs).view_as(out))
    return result


def _finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{name} must be a finite number, got {value!r}")
    return float(value)
