"""Rows of logits on a GPU: value, entropy and gradient in three visits of a row; docs/kernels.md derives it.

A local divergence is a function of one class, (ln q, ln p) -> (value, slope = d value / d ln q); D is the sum of values
and its gradient for a logit is slope_k - q_k sum_j slope_j. Everything is fp32. Nothing comes from `libdevice`, which
Triton's interpreter has not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from abkd.divergences import JSD, AlphaBeta, Divergence, ForwardKL, ReverseKL, SkewedForwardKL, SkewedReverseKL

_BLOCK, _WARPS = 2048, 8  # of a tile: 115 registers a thread on sm_90, so that two rows share a multiprocessor

_SERIES_RANGE = tl.constexpr(1.0)  # nodes closer together than this are summed as a power series


def divergence_rows(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    ce_weights: Tensor | None,
    labels: Tensor | None,
    divergence: Divergence,
    *,
    temperature: float,
    teacher_temperature: float,
    gradient: Tensor,
) -> Tensor:
    """Divergence, entropy and cross-entropy `[3, rows]`, fp32, of logits `[rows, vocab]`.

    Args:
        student, teacher: fp32, bf16 or fp16, rows contiguous; a class at -inf in both adds nothing.
        weights, ce_weights: `[rows]`, fp32; labels: `[rows]`, int64, in the vocabulary.
        gradient: `[rows, vocab]`, written: that of sum weights * D + ce_weights * CE with respect to the student's
            logits, in its dtype; may be `student` itself.

    A row whose limits are another path's has a divergence that is not finite: a logit at -inf in one row alone, or a
    power that overflows.
    """
    local, parameters = local_divergence(divergence)
    num_rows, vocab = student.shape
    values = student.new_empty(3, num_rows, dtype=torch.float32)
    _rows[(num_rows,)](
        student,
        teacher,
        gradient,
        values,
        weights,
        weights if ce_weights is None else ce_weights,
        weights if labels is None else labels,
        num_rows,
        vocab,
        student.stride(0),
        teacher.stride(0),
        gradient.stride(0),
        1 / temperature,
        1 / teacher_temperature,
        parameters,
        local,
        ce_weights is not None,
        _BLOCK,
        num_warps=_WARPS,
    )
    return values


def local_divergence(divergence: Divergence):
    """The function of one class, and its parameters; ValueError where there is none."""
    match divergence:
        case ForwardKL():
            return _alpha_beta, _of_the_plane(1.0, 0.0)
        case ReverseKL():
            return _alpha_beta, _of_the_plane(0.0, 1.0)
        case AlphaBeta(alpha=alpha, beta=beta):
            return _alpha_beta, _of_the_plane(alpha, beta)
        case JSD(mix=mix):
            return _jsd, (mix, 1 - mix)
        case SkewedForwardKL(mix=mix):
            return _skewed_forward_kl, (mix, 1 - mix)
        case SkewedReverseKL(mix=mix):
            return _skewed_reverse_kl, (mix, 1 - mix)
    raise ValueError(divergence.kind)


def _of_the_plane(alpha: float, beta: float) -> tuple[float, ...]:
    """alpha, beta, s, and the nodes (s - offset) ln q + offset ln p for offsets low <= middle <= high."""
    s = alpha + beta
    low, middle, high = sorted((0.0, alpha, s))
    return alpha, beta, s, low, s - low, high, s - high, high - middle, middle - low


@triton.jit
def _rows(
    student,
    teacher,
    gradient,
    values,
    weights,
    ce_weights,
    labels,
    num_rows,
    vocab,
    student_stride,
    teacher_stride,
    gradient_stride,
    student_scale,
    teacher_scale,
    parameters,
    local: tl.constexpr,
    has_labels: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    gradient += row * gradient_stride

    # first visit: ln sum exp; the maxima start low but finite, since -inf - -inf is NaN
    q_top, p_top, ce_top = -3.0e38, -3.0e38, -3.0e38
    q_sum, p_sum, ce_sum = 0.0, 0.0, 0.0
    for start in range(0, vocab, block):
        z_q, z_p, _ = _logits(student, teacher, start, vocab, block)
        q_top, q_sum = _add_exp(q_top, q_sum, z_q * student_scale)
        p_top, p_sum = _add_exp(p_top, p_sum, z_p * teacher_scale)
        if has_labels:
            ce_top, ce_sum = _add_exp(ce_top, ce_sum, z_q)
    q_rest, p_rest, ce_rest = tl.log(q_sum), tl.log(p_sum), tl.log(ce_sum)  # apart from the maxima: nothing is rounded

    # second visit: D, sum of slopes, entropy
    divergence, slopes, entropy = 0.0, 0.0, 0.0
    for start in range(0, vocab, block):
        z_q, z_p, live = _logits(student, teacher, start, vocab, block)
        log_q = tl.where(live, z_q * student_scale - q_top - q_rest, 0.0)
        log_p = tl.where(live, z_p * teacher_scale - p_top - p_rest, 0.0)
        value, slope = local(log_q, log_p, parameters)
        divergence += tl.sum(tl.where(live, value, 0.0))
        slopes += tl.sum(tl.where(live, slope, 0.0))
        entropy -= tl.sum(tl.exp(log_q) * log_q)
    tl.store(values + row, divergence)
    tl.store(values + num_rows + row, entropy)

    # third visit: the gradient
    scale = tl.load(weights + row) * student_scale
    ce_weight, label = 0.0, -1
    if has_labels:
        ce_weight = tl.load(ce_weights + row)
        label = tl.load(labels + row)
        tl.store(values + 2 * num_rows + row, ce_rest - (tl.load(student + label).to(tl.float32) - ce_top))
    else:
        tl.store(values + 2 * num_rows + row, 0.0)
    for start in range(0, vocab, block):
        z_q, z_p, live = _logits(student, teacher, start, vocab, block)
        log_q = tl.where(live, z_q * student_scale - q_top - q_rest, 0.0)
        log_p = tl.where(live, z_p * teacher_scale - p_top - p_rest, 0.0)
        _, slope = local(log_q, log_p, parameters)
        found = (slope - tl.exp(log_q) * slopes) * scale
        columns = start + tl.arange(0, block)
        if has_labels:
            found += ce_weight * (tl.exp(tl.where(live, z_q - ce_top - ce_rest, 0.0)) - (columns == label))
        found = tl.where(live, found, 0.0)
        tl.store(gradient + columns, found.to(gradient.dtype.element_ty), mask=columns < vocab)


@triton.jit
def _logits(student, teacher, start, vocab, block: tl.constexpr):
    """A tile of both rows in fp32, -inf outside; live where a logit is above -inf."""
    columns = start + tl.arange(0, block)
    inside = columns < vocab
    z_q = tl.load(student + columns, mask=inside, other=-float("inf")).to(tl.float32)
    z_p = tl.load(teacher + columns, mask=inside, other=-float("inf")).to(tl.float32)
    # written so that NaN is live
    return z_q, z_p, inside & ~((z_q == -float("inf")) & (z_p == -float("inf")))


@triton.jit
def _add_exp(top, total, logits):
    """Running maximum and running sum of exp(logit - maximum)."""
    new = tl.maximum(top, tl.max(logits))
    return new, total * tl.exp(top - new) + tl.sum(tl.exp(logits - new))


@triton.jit
def _alpha_beta(log_q, log_p, parameters):
    """u^2 exp[x0, x1, x2] and -u exp[x0, x1], equations (1) and (2) of `abkd.divergences.alpha_beta`."""
    alpha, beta, s, low, s_low, high, s_high, upper, lower = parameters
    u = log_p - log_q
    slope = -u * tl.exp(tl.maximum(s * log_q, alpha * log_p + beta * log_q)) * _exp_slope(-tl.abs(alpha * u))
    top = tl.exp(tl.maximum(s_low * log_q + low * log_p, s_high * log_q + high * log_p))
    top_gap = tl.abs(u) * tl.where(u > 0, upper, lower)
    low_gap = tl.abs(u) * tl.where(u > 0, lower, upper)
    span = top_gap + low_gap
    far = top * (_exp_slope(-top_gap) - tl.exp(-top_gap) * _exp_slope(-low_gap)) / tl.maximum(span, _SERIES_RANGE)
    near = tl.exp(s * log_q) * _second_difference(tl.where(span > _SERIES_RANGE, 0.0, u), alpha, s)
    return u * u * tl.where(span > _SERIES_RANGE, far, near), slope


@triton.jit
def _second_difference(u, alpha, s):
    """exp[0, alpha u, s u] = sum_n h_n(alpha u, s u) / (n + 2)!, h_n the complete homogeneous polynomial."""
    power = alpha * u
    homogeneous = power * 0.0 + 1.0
    total = homogeneous / 2
    factorial = 2.0
    for n in tl.static_range(12):
        homogeneous = s * u * homogeneous + power
        power *= alpha * u
        factorial *= n + 3
        total += homogeneous / factorial
    return total


@triton.jit
def _jsd(log_q, log_p, parameters):
    mix, rest = parameters
    value, _, slope = _kl_to_mixture(log_p, log_q, mix, rest)
    other, other_slope, _ = _kl_to_mixture(log_q, log_p, rest, mix)
    return mix * value + rest * other, mix * slope + rest * other_slope


@triton.jit
def _skewed_forward_kl(log_q, log_p, parameters):
    mix, rest = parameters
    value, _, slope = _kl_to_mixture(log_p, log_q, mix, rest)
    return value, slope


@triton.jit
def _skewed_reverse_kl(log_q, log_p, parameters):
    mix, rest = parameters
    value, slope, _ = _kl_to_mixture(log_q, log_p, rest, mix)
    return value, slope


@triton.jit
def _kl_to_mixture(first, second, share, rest):
    """a phi(ln m/a) of m = share a + rest b, and its slopes in ln a and in ln b; (5) and (6) of `mixture`."""
    x = second - first
    toward_b, toward_a = tl.minimum(x, 1.0), tl.maximum(x, 1.0)
    t = tl.where(
        x > 1.0,
        toward_a + _log1p(share * -toward_a * _exp_slope(-toward_a)),
        _log1p(rest * toward_b * _exp_slope(toward_b)),
    )
    a = tl.exp(first)
    excess = t * _exp_slope(-t)  # 1 - a/m
    value = tl.where(tl.abs(t) > _SERIES_RANGE, tl.exp(first + t) - a * (1 + t), a * _exp_excess(t))
    return value, a * (share * excess - t), rest * tl.exp(second) * excess


@triton.jit
def _exp_slope(x):
    """exp[0, x] = (e^x - 1) / x, 1 at 0."""
    near = tl.abs(x) < 0.5
    y = tl.where(near, x, 0.0)
    series = y * 0.0 + 1.0
    for n in tl.static_range(8):
        series = 1 + series * y / (9 - n)
    z = tl.where(near, 1.0, x)
    return tl.where(near, series, (tl.exp(z) - 1) / z)


@triton.jit
def _exp_excess(t):
    """e^t - 1 - t for |t| <= 1, else anything."""
    y = tl.where(tl.abs(t) > _SERIES_RANGE, 0.0, t)
    series = y * 0.0 + 1.0
    for n in tl.static_range(9):
        series = 1 + series * y / (11 - n)
    return y * y / 2 * series


@triton.jit
def _log1p(x):
    """ln(1 + x) for x > -1; near 0 by the series of artanh."""
    near = tl.abs(x) < 0.5
    y = tl.where(near, x, 0.0)
    z = y / (2 + y)
    square = z * z
    series = square * 0.0
    for n in tl.static_range(8):
        series = series * square + 1.0 / (15 - 2 * n)
    return tl.where(near, 2 * z * series, tl.log(1 + tl.where(near, 0.0, x)))
