"""The alpha-beta-divergence: value and gradients, in logarithms, for every real (alpha, beta).

p is the teacher, q the student, u = ln p - ln q, s = alpha + beta, k runs over the vocabulary.
With exp[x0, .., xn] the n-th divided difference of exp, and the nodes

    x0 = ln q^s = s ln q,    x1 = ln p^alpha q^beta = x0 + alpha u,    x2 = ln p^s = x0 + s u,

the divergence is D = sum_k u^2 exp[x0, x1, x2]                                              (1)
and with w_k = u exp[x0, x1] = q^beta (p^alpha - q^alpha) / alpha                            (2)
its gradients are dD/d ln q_k = -w_k, and dD/d ln p_k = -w_k with the roles exchanged:
D^(alpha,beta)(p||q) = D^(beta,alpha)(q||p)                                                  (3)

and with one node doubled its slope in alpha is

    dD/dalpha = sum_k u^2 (ln p exp[x0, x1, x2] - u exp[x0, x0, x1, x2]),                    (4)

that in beta again by (3). exp[...] is entire, so alpha = 0, beta = 0 and alpha + beta = 0 are ordinary points.
The derivation is in docs/divergences.md.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from abkd import ranges
from abkd.divergences.exp_difference import exp_difference
from abkd.divergences.rows import matching_rows
from abkd.errors import InputError

_SERIES_RANGE = 1.0  # nodes closer together than this are summed as a power series in u
_TINY_EXPONENT = 1e-20  # below it (p^a - q^a)/a is ln p - ln q to rounding, for any finite logs
_TINY_GAP = 1e-30  # (1 - e^-gap) / gap is 1 to rounding there, and not yet 0/0
_BLOCK_ELEMENTS = 2**20  # temporaries of one block stay in a CPU's last cache; see docs/decisions.md


def alpha_beta(*, student: Tensor, teacher: Tensor, alpha: float | Tensor, beta: float | Tensor) -> Tensor:
    """-1/(alpha beta) * sum_k [p^alpha q^beta - alpha/s p^s - beta/s q^s], s = alpha + beta, and its limits.

    Args:
        student: log-probabilities ln q, `[..., vocab]`.
        teacher: log-probabilities ln p, same shape.
        alpha: hardness-concentration, any finite real; smaller chases large errors harder. A number, or a
            tensor that broadcasts against `[...]`: one value per row, or a learned one.
        beta: confidence-concentration, likewise; larger trusts the student's confidence more.

    Returns:
        `[...]`, nats for normalised rows, >= 0, exactly 0 at p = q; fp32 at least, whatever the inputs.
        Differentiable once, by the closed form, in `student`, `teacher`, and `alpha` and `beta` where they are
        tensors (their slopes are computed in fp64, at many times the cost of the others).

    Edges:
        A class at -inf in both rows adds exactly 0 to value and gradient. At -inf in one row the
        limit is returned: q = 0 < p is finite when beta > 0 and s > 0, p = 0 < q when alpha > 0 and
        s > 0, both are `+inf` otherwise (forward KL at q = 0). The gradient is never NaN: a class
        whose gradient grows without bound, or overflows, adds nothing to it, and the value is then
        `+inf`, so the step is visible. NaN in gives NaN out.

    Raises:
        InputError: alpha or beta is not finite, or does not broadcast; the shapes differ.

    Source: Wang et al., "ABKD", ICML 2025, Def. 4.1 and App. B, Eq. 8; gradient: Eq. 132.
        Cichocki, Cruces and Amari, "Generalized alpha-beta divergences", Entropy 13(1), 2011.
    """
    student, teacher = matching_rows(student, teacher)
    exponents = [_exponent("alpha", alpha, student), _exponent("beta", beta, student)]
    if any(exponent.dim() > 0 for exponent in exponents):
        exponents = [exponent.to(student.device).expand(student.shape[:-1]) for exponent in exponents]
    return _AlphaBeta.apply(student, teacher, *exponents)


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
    """alpha and beta: fp64, without dimensions or of the shape `[...]`."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher, alpha, beta)
        return _by_rows(lambda *row: _class_values(*row).sum(-1), student, teacher, alpha, beta)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        student, teacher, alpha, beta = ctx.saved_tensors
        given, exchanged = (student, teacher, alpha, beta), (teacher, student, beta, alpha)  # (3)
        needed, class_grad = ctx.needs_input_grad, -grad.unsqueeze(-1)
        return (
            _by_classes(_class_weights, *given).mul_(class_grad) if needed[0] else None,
            _by_classes(_class_weights, *exchanged).mul_(class_grad) if needed[1] else None,
            _by_rows(_alpha_slopes, *given).to(alpha.dtype).mul_(grad) if needed[2] else None,
            _by_rows(_alpha_slopes, *exchanged).to(beta.dtype).mul_(grad) if needed[3] else None,
        )


def _class_values(student: Tensor, teacher: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """(1) per class with its limits at probability 0, `[rows, vocab]`; alpha and beta: `[]` or `[rows, 1]`."""
    if _all_finite(student, teacher):
        return _finite_values(student, teacher, alpha, beta)
    student, teacher, student_only, teacher_only = _set_zeros_apart(student, teacher)
    value = _finite_values(student, teacher, alpha, beta)
    value = torch.where(student_only, _value_at_zero(teacher, beta, alpha + beta), value)
    return torch.where(teacher_only, _value_at_zero(student, alpha, alpha + beta), value)


def _class_weights(student: Tensor, teacher: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """(2) per class with its limits at probability 0, `[rows, vocab]`, never infinite."""
    if _all_finite(student, teacher):
        weights = _finite_weights(student, teacher, alpha, beta)
        return weights.masked_fill_(weights.isinf(), 0.0)
    student, teacher, student_only, teacher_only = _set_zeros_apart(student, teacher)
    weights = _finite_weights(student, teacher, alpha, beta)
    a, b, s = (exponent.to(student) for exponent in (alpha, beta, alpha + beta))
    at_student_zero = torch.where((b == 0) & (a > 0), (a * teacher).exp() / a, 0.0)
    at_student_zero = torch.where((s == 0) & (b > 0), 1 / b, at_student_zero)
    at_teacher_zero = torch.where(a > 0, (s * student).exp() / -a, 0.0)
    weights = torch.where(student_only, at_student_zero, weights)
    weights = torch.where(teacher_only, at_teacher_zero, weights)
    return weights.masked_fill_(weights.isinf(), 0.0)


def _alpha_slopes(student: Tensor, teacher: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """(4), `[rows]` in fp64; a class whose value or slope is infinite adds nothing."""
    student, teacher, student_only, teacher_only = _set_zeros_apart(student.double(), teacher.double())
    alpha, beta = alpha.to(student.device), beta.to(student.device)
    s, u = alpha + beta, teacher - student
    x0, x1, x2 = s * student, alpha * teacher + beta * student, s * teacher
    slopes = teacher * exp_difference(x0, x1, x2) - u * exp_difference(x0, x0, x1, x2)
    slopes = (u * u * slopes).masked_fill(u == 0, 0.0)
    at_student_zero = _value_at_zero(teacher, beta, s) * (teacher - 1 / s)
    at_teacher_zero = _value_at_zero(student, alpha, s) * (student - 1 / s - 1 / alpha)
    slopes = torch.where(student_only, at_student_zero, slopes)
    slopes = torch.where(teacher_only, at_teacher_zero, slopes)
    overflown = slopes.isinf() | (slopes.isnan() & ~student.isnan() & ~teacher.isnan())
    return slopes.masked_fill(overflown, 0.0).sum(-1)


def _finite_values(student: Tensor, teacher: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """u^2 exp[x0, x1, x2] (1) of finite logarithms."""
    s = alpha + beta
    u = teacher - student
    offsets = torch.stack([torch.zeros_like(s), alpha, s]).sort(dim=0).values
    low, middle, high = offsets  # the nodes are (s - offset) ln q + offset ln p, so ordered or reversed
    upper, lower = (high - middle).to(u.dtype), (middle - low).to(u.dtype)  # in fp64 until here
    up, down = u.clamp(min=0), (-u).clamp_(min=0)
    top_gap = up * upper + down * lower
    low_gap = up.mul_(lower).add_(down.mul_(upper))
    top = torch.maximum(
        *((s - offset).to(u.dtype) * student + offset.to(u.dtype) * teacher for offset in (low, high))
    ).exp_()
    slopes = _exp_ratio(top_gap).sub_(_exp_ratio(low_gap).mul_((-top_gap).exp_()))
    span = top_gap.add_(low_gap)
    far = slopes.mul_(top).div_(span)
    near = _series(u, alpha, s).mul_((s.to(u.dtype) * student).exp_())
    value = torch.where(span > _SERIES_RANGE, far, near).mul_(u).mul_(u)
    if bool((torch.minimum(alpha, beta) < 0).any()):
        value.masked_fill_(u == 0, 0.0)  # a negative power may have overflown
    return value


def _finite_weights(student: Tensor, teacher: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """u exp[x0, x1] (2) of finite logarithms: sign(u) e^max(x0, x1) (1 - e^-|alpha u|) / |alpha|."""
    u = teacher - student
    a, b, s = (exponent.to(u.dtype) for exponent in (alpha, beta, alpha + beta))
    size = a.abs().clamp(min=_TINY_EXPONENT)
    top = torch.maximum(s * student, a * teacher + b * student).exp_()
    return top.mul_(torch.expm1((size * u).abs_().neg_())).mul_(torch.sign(u)).div_(-size)


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


def _value_at_zero(log_other: Tensor, exponent: Tensor, s: Tensor) -> Tensor:
    """One class's value where one probability is 0: other^s / (s * exponent), exponent that of the 0."""
    finite = ((exponent > 0) & (s > 0)).to(log_other.device)
    exponent, s = exponent.to(log_other), s.to(log_other)
    return torch.where(finite, (s * log_other).exp_().div_(s * exponent), math.inf)


def _series(u: Tensor, alpha: Tensor, s: Tensor) -> Tensor:
    """exp[0, alpha u, s u] = sum_n h_n(alpha, s) u^n / (n + 2)! where its arguments are at most 1; h_n: see docs."""
    num_terms = 13 if u.dtype == torch.float32 else 20
    coefficients, homogeneous, power, factorial = [], torch.ones_like(alpha), alpha, 2.0
    for n in range(num_terms):
        coefficients.append((homogeneous / factorial).to(u.dtype))
        homogeneous, power = s * homogeneous + power, power * alpha
        factorial *= n + 3
    total = u * coefficients.pop() + coefficients.pop()
    while coefficients:
        total.mul_(u).add_(coefficients.pop())
    return total


def _exp_ratio(gap: Tensor) -> Tensor:
    """exp[0, -gap] = (1 - e^-gap) / gap for gap >= 0, 1 at 0."""
    negative = gap.clamp(min=_TINY_GAP).neg_()
    return torch.expm1(negative).div_(negative)


def _by_rows(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function` of blocks of rows, which gives one number a row, `[...]`."""
    result = torch.zeros(inputs[0].shape[:-1], dtype=inputs[0].dtype, device=inputs[0].device)
    return _by_blocks(function, result, *inputs)


def _by_classes(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function` of blocks of rows, which gives one number a class, `[..., vocab]`."""
    return _by_blocks(function, torch.zeros_like(inputs[0], memory_format=torch.contiguous_format), *inputs)


def _by_blocks(
    function: Callable[..., Tensor], result: Tensor, first: Tensor, second: Tensor, alpha: Tensor, beta: Tensor
) -> Tensor:
    """Fills `result` with `function` of `[rows, vocab]` blocks and their exponents, `[]` or `[rows, 1]`."""
    if first.numel() == 0:
        return result
    vocab = first.shape[-1]
    num_rows = first.numel() // vocab
    rows = max(1, _BLOCK_ELEMENTS // vocab) if first.device.type == "cpu" else num_rows
    blocks = [tensor.reshape(num_rows, -1).split(rows) for tensor in (result, first, second)]
    for exponent in (alpha, beta):
        per_row = exponent.dim() > 0
        blocks.append(exponent.reshape(num_rows, 1).split(rows) if per_row else [exponent] * len(blocks[0]))
    for out, *inputs in zip(*blocks, strict=True):
        out.copy_(function(*inputs).view_as(out))
    return result


def _exponent(name: str, value: float | Tensor, student: Tensor) -> Tensor:
    """fp64, `[]` of a number or `[...]` of a tensor."""
    if not isinstance(value, Tensor):
        return torch.tensor(ranges.finite(name, value), dtype=torch.float64)  # on the CPU: no wait for a device
    if value.dtype == torch.bool or not bool(value.isfinite().all()):
        raise InputError(f"{name} must hold finite numbers, got {value!r}")
    try:
        return value.to(student.device, torch.float64).expand(student.shape[:-1])
    except RuntimeError:
        raise InputError(
            f"{name} of shape {tuple(value.shape)} must broadcast to the rows {tuple(student.shape[:-1])}"
        ) from None
