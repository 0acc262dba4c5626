"""Output head and divergence in one pass: `linear_divergence` and, with a cross-entropy beside it, `linear_loss`."""

import logging
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from abkd import ranges
from abkd.divergences import Divergence
from abkd.errors import InputError
from abkd.head import LMHead
from abkd.kernels import native
from abkd.kernels.chunked import chunked_loss, why_not_triton
from abkd.kernels.cross_entropy import linear_cross_entropy
from abkd.kernels.kept import why_reduced
from abkd.kernels.reference import LinearLoss, Problem, reference_loss
from abkd.targets import MixtureTargets, Targets, TopKTargets

__all__ = ["LinearDivergence", "LinearLoss", "Path", "linear_cross_entropy", "linear_divergence", "linear_loss"]

Path = Literal["auto", "reference", "chunked", "triton"]
_log = logging.getLogger("abkd")
_said: set[str] = set()


class LinearDivergence(NamedTuple):
    total: Tensor
    """Scalar, differentiable: sum_n token_weights[n] * D[n]."""
    divergence: Tensor
    """D, `[N]`, detached, nats."""
    entropy: Tensor
    """Of the student, `[N]`, detached, nats."""


def linear_divergence(
    student_hidden: Tensor,
    student_head: LMHead,
    targets: Targets,
    *,
    divergence: Divergence,
    token_weights: Tensor,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    path: Path = "auto",
) -> LinearDivergence:
    """D = divergence(student=log_softmax(head.logits(hidden) / T), teacher=log_softmax(targets / T')), and sum w * D.

    The logits are never all there at once. Gradients for hidden, weight and bias of the student, and for what in
    `targets` asks for one; none is computed for what is frozen.

    Args:
        student_hidden: `[N, hidden]`, what the student's output head receives; fp32, bf16, fp16 or fp64.
        student_head: its head; the weight may have another dtype.
        targets: of the same N tokens and the same vocabulary. `TopKTargets` have no row of the teacher made, or one
            chunk of them at a time where their tail is "uniform".
        divergence: any of `abkd.divergences.KINDS`.
        token_weights: `[N]`, constants: mask, weight and normalisation are the caller's.
        temperature, teacher_temperature: > 0, divide the logits; the teacher's is the student's where None.
        path: "reference" holds all logits and takes autograd; "chunked" takes the gradient in the forward, chunk
            by chunk, on any device; "triton" likewise, with the elementwise work in Triton on a GPU, for the alpha-beta
            family, JSD and the skewed KLs; "auto" is triton where that can be, else chunked, and says once which.

    Returns:
        fp32 at least, whatever the inputs: logits, softmax and sums are fp32 for half inputs. Without a token, zeros
        attached to the graph. Edges of D as `alpha_beta`; the gradient is never NaN unless an input is.

    Raises:
        InputError: shapes, vocabularies or parameters that do not fit.
    """
    loss = linear_loss(
        student_hidden,
        student_head,
        targets,
        divergence=divergence,
        token_weights=token_weights,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        path=path,
    )
    return LinearDivergence(*loss[:3])


@torch.compiler.disable
def linear_loss(
    student_hidden: Tensor,
    student_head: LMHead,
    targets: Targets,
    *,
    divergence: Divergence,
    token_weights: Tensor,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    labels: Tensor | None = None,
    ce_weights: Tensor | None = None,
    path: Path = "auto",
    rows: int | None = None,
    group: ProcessGroup | None = None,
) -> LinearLoss:
    """`linear_divergence` with a cross-entropy from the same logits: total = sum w * D + sum ce_weights * CE.

    Args:
        labels: `[N]`, int64, for the cross-entropy, which is at temperature 1.
        ce_weights: `[N]`, constants; with labels or not at all.
        rows: of logits held at once by the chunked path; chosen from shape and machine where None.
        group: of ranks that hold the vocabulary in pieces, in the order of its ranks: each gives its rows of the
            heads' weights and biases (student's and teacher's split alike), all the same hidden states and labels.
            Every rank gets the whole values and hidden gradient, and its piece of the weight's. For the
            alpha-beta family.
    """
    _check(student_hidden, student_head, targets, token_weights, labels, ce_weights, path, rows, group)
    ranges.temperatures(temperature, teacher_temperature, "none")
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    if isinstance(targets, TopKTargets):
        targets.check_temperature(teacher_temperature)
        teacher_temperature = 1.0  # its log-probabilities are at it
    problem = Problem(
        student_hidden,
        student_head,
        targets,
        divergence,
        token_weights.detach(),
        temperature,
        teacher_temperature,
        labels,
        None if ce_weights is None else ce_weights.detach(),
    )
    if path == "reference" and group is None:
        return reference_loss(problem)
    reason = "" if path == "chunked" else why_not_triton(problem, group)
    if path == "triton" and reason:
        raise InputError(f"path=triton: {reason}; use path=auto")
    if path == "auto":
        _say_once(_choice(student_hidden.device.type, reason, why_reduced(targets, divergence)))
        path = "chunked" if reason or student_hidden.device.type == "cpu" else "triton"  # no interpreter unasked
    return chunked_loss(problem, rows, group, in_triton=path == "triton")


def _choice(device: str, why_not_triton: str, why_reduced: str) -> str:
    if device != "cpu":
        not_triton = f"chunked, in torch on {device}, not in triton: {why_not_triton}"
        return f"linear_divergence: {not_triton if why_not_triton else 'triton'}"
    if why_reduced:
        return f"linear_divergence: chunked, in torch: {why_reduced}"
    if isinstance(reason := native.library(), str):
        return f"linear_divergence: chunked, in torch: {reason}"
    return "linear_divergence: chunked, alpha-beta in compiled C, other divergences in torch"


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        _log.info(line)


def _check(hidden, head: LMHead, targets: Targets, token_weights, labels, ce_weights, path, rows, group) -> None:
    if path not in get_args(Path):
        raise InputError(f"path must be one of {', '.join(get_args(Path))}, got {path!r}")
    if hidden.dim() != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise InputError(
            f"student_hidden must be [N, {head.weight.shape[1]}] for the student's head, got {tuple(hidden.shape)}"
        )
    if isinstance(targets, MixtureTargets) and group is not None:
        raise InputError(
            "group: a mixture's rows are of the whole vocabulary; use one teacher's hidden states or logits"
        )
    if isinstance(targets, TopKTargets) and group is not None:
        raise InputError("group: top-k targets hold classes of the whole vocabulary; use hidden states or logits")
    if targets.shape != (len(hidden), head.vocab):
        raise InputError(
            f"targets are of {targets.shape[0]} tokens and {targets.shape[1]} classes, "
            f"the student of {len(hidden)} and {head.vocab}"
        )
    for name, value in (("token_weights", token_weights), ("labels", labels), ("ce_weights", ce_weights)):
        if value is not None and value.shape != hidden.shape[:1]:
            raise InputError(f"{name} must be [N] = [{len(hidden)}], got {tuple(value.shape)}")
    if (labels is None) != (ce_weights is None):
        raise InputError("labels and ce_weights go together; give both or neither")
    if path == "reference" and group is not None:
        raise InputError("group: the reference holds the whole vocabulary; use path=chunked")
    if (
        labels is not None
        and group is None
        and len(labels)
        and not 0 <= int(labels.min()) <= int(labels.max()) < head.vocab
    ):
        raise InputError(f"labels must lie between 0 and {head.vocab - 1}")
    if rows is not None and rows < 1:
        raise InputError(f"rows must be at least 1, got {rows!r}")
