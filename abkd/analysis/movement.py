"""Where a step moves the student's probability mass: numbers in, numbers out.

p is the teacher, q the student before the step, q' after it. A class is over-estimated where q > p and under-estimated
where q < p; it lies in the teacher's tail where p < 0.01 max p.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from abkd.analysis.log_ratio import log_ratio, logit_gradient
from abkd.analysis.mass import RANK_LABELS, rank_order, rank_sums
from abkd.calibrations import Calibration, DivergenceCalibration
from abkd.divergences import Divergence
from abkd.errors import InputError
from abkd.ranks import gather

ERROR_EDGES = (-3.0, -1.0, -0.3, 0.0, 0.3, 1.0, 3.0)
"""Edges between the buckets of ln p - ln q, in nats; an edge belongs to the bucket above it."""
ERROR_LABELS = (
    "< -3", "-3 to -1", "-1 to -0.3", "-0.3 to 0", "0 to 0.3", "0.3 to 1", "1 to 3", "≥ 3",
)  # fmt: skip
TAIL_RATIO = 0.01
TOP_K = 10
_CHUNK_ELEMENTS = 2**20  # a temporary of one chunk takes 8 MiB


class Buckets(NamedTuple):
    """One number a bucket; means over the rows."""

    labels: tuple[str, ...]
    student: tuple[float, ...]
    """The student's mass before the step; sums to 1."""
    teacher: tuple[float, ...]
    """The teacher's mass; sums to 1."""
    moved: tuple[float, ...]
    """What the step adds to the student's mass; sums to 0."""
    gradient_share: tuple[float, ...] | None
    """The bucket's part of sum |dD/dz| over all rows; sums to 1. None for a gradient that is 0 or not known."""


class MassStep(NamedTuple):
    """What one step does to the student's mass; means over the rows. In the limit of small steps all but `misplaced` is
    proportional to the step size: divide by `moved` to compare divergences."""

    num_rows: int
    moved: float
    """(1/2) sum |q' - q|: the mass that changes class."""
    over_to_under: float
    """Mass gained by the under-estimated classes."""
    into_target: float | None
    """Mass gained by the label; None without labels."""
    into_top: float
    """Mass gained by the teacher's `top_k` likeliest classes."""
    into_tail: float
    """Mass gained by the teacher's tail."""
    misplaced: float
    """(1/2) sum |p - q| before the step: the mass that has to move."""
    misplaced_after: float
    """The same after it."""
    by_rank: Buckets
    """By the rank that the teacher gives the class, see `RANK_EDGES`."""
    by_error: Buckets
    """By ln p - ln q before the step, see `ERROR_EDGES`."""


def mass_step(
    divergence: Divergence | Calibration,
    *,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    step_size: float = 1.0,
    top_k: int = TOP_K,
) -> MassStep:
    """Where one step z - step_size * dD/dz on the logits of these rows moves the mass. Memory does not grow with N.

    Args:
        divergence: as in `logit_gradient`.
        student, teacher: logits or log-probabilities, `[N, vocab]`, N >= 1.
        labels: `[N]`, the tokens or classes that the data hold.
        step_size: the learning rate if the logits were the parameters. 1 moves a forward KL's logit by p - q.
        top_k: at least 1.
    """
    meter = MassMeter(divergence, step_size=step_size, top_k=top_k)
    whole_batch = isinstance(divergence, Calibration) and not isinstance(divergence, DivergenceCalibration)
    rows = len(student) if whole_batch else max(1, _CHUNK_ELEMENTS // student.shape[-1])
    for start in range(0, len(student), rows):
        chunk = slice(start, start + rows)
        meter(student[chunk], teacher[chunk], None if labels is None else labels[chunk])
    return meter.result()


class MassMeter:
    """Gathers a `MassStep` over batches, of all ranks.

    Called with `[N, vocab]` logits or log-probabilities of student and teacher it takes the step of `mass_step`, as
    `fidelity(per_token=)` does; `add` takes a step that was really made. The N rows of a call are worked on at once.
    """

    def __init__(
        self, divergence: Divergence | Calibration | None = None, *, step_size: float = 1.0, top_k: int = TOP_K
    ):
        if top_k < 1:
            raise InputError(f"top_k must be at least 1, got {top_k!r}")
        self.divergence, self.step_size, self.top_k = divergence, step_size, top_k
        self._sums: dict[str, Tensor] = {}

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> None:
        if self.divergence is None:
            raise InputError("this MassMeter has no divergence to step by; give it one, or call add()")
        step = _step(self.divergence, student, teacher, labels, self.step_size)
        self.add(before=step.before, after=step.after, teacher=step.teacher, gradient=step.gradient, labels=labels)

    def add(
        self,
        *,
        before: Tensor,
        after: Tensor,
        teacher: Tensor,
        gradient: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """One step of any kind.

        Args:
            before, after: the student's log-probabilities on both sides of it, `[N, vocab]`.
            teacher: log-probabilities, same shape.
            gradient: dD/dz before the step, same shape.
            labels: `[N]`.

        Raises:
            InputError: shapes differ; some calls have a gradient or labels and others have not.
        """
        found = _flows(before, after, teacher, labels, self.top_k)
        sums = {name: values.sum() for name, values in found.items()}
        sums["num_rows"] = torch.tensor(float(len(before)))
        q, p = before.double().exp(), teacher.double().exp()
        measured = {"student": q, "teacher": p, "moved": after.double().exp() - q}
        if gradient is not None:
            measured["gradient"] = gradient.double().abs()
        order, error = rank_order(teacher), _error_buckets(before, teacher)
        for name, values in measured.items():
            sums[f"rank {name}"] = rank_sums(values.gather(-1, order), total=values.sum())
            sums[f"error {name}"] = torch.stack([values[error == index].sum() for index in range(len(ERROR_LABELS))])
        if self._sums and sums.keys() != self._sums.keys():
            raise InputError("a gradient and labels must come with all rows of a MassMeter, or with none")
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double().cpu()

    def result(self) -> MassStep:
        """Over the rows of all ranks, which all ask for it.

        Raises:
            InputError: no rank gave a row.
        """
        parts = [part for part in gather(self._sums) if part]
        if not parts:
            raise InputError("this MassMeter has no rows; give it some first")
        sums = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
        num_rows = int(sums["num_rows"])
        means = {name: (sums[name] / num_rows).item() for name in MassStep._fields if sums.get(name) is not None}
        buckets = {
            "by_rank": _buckets("rank", RANK_LABELS, sums, num_rows),
            "by_error": _buckets("error", ERROR_LABELS, sums, num_rows),
        }
        return MassStep(**({"into_target": None} | means | {"num_rows": num_rows} | buckets))  # type: ignore[arg-type]


def mass_scalars(
    divergence: Divergence | Calibration,
    *,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    step_size: float = 1.0,
    top_k: int = TOP_K,
) -> dict[str, float]:
    """The plain numbers of `mass_step` as `mass_moved`, `mass_over_to_under`, ... for a log; without the buckets.

    For a few rows: all of them are worked on at once, in about ten temporaries of 8 N vocab bytes.
    """
    step = _step(divergence, student, teacher, labels, step_size)
    flows = _flows(step.before, step.after, step.teacher, labels, top_k)
    del flows["misplaced_after"]
    names = [f"mass_{name}" for name in flows]
    return dict(zip(names, torch.stack([*flows.values()]).mean(-1).tolist(), strict=True))


class _Step(NamedTuple):
    """Log-probabilities and gradient, `[N, vocab]`, of one step on the logits."""

    before: Tensor
    after: Tensor
    teacher: Tensor
    gradient: Tensor


def _step(
    divergence: Divergence | Calibration, student: Tensor, teacher: Tensor, labels: Tensor | None, step_size: float
) -> _Step:
    gradient = logit_gradient(divergence, student=student, teacher=teacher, labels=labels)
    before, goal = (rows.detach().double().log_softmax(-1) for rows in (student, teacher))
    return _Step(before, before + log_ratio(before, gradient, step_size), goal, gradient)


def _flows(before: Tensor, after: Tensor, teacher: Tensor, labels: Tensor | None, top_k: int) -> dict[str, Tensor]:
    """Name -> one number a row, `[N]`; the fields of `MassStep`."""
    if not before.shape == after.shape == teacher.shape:
        shapes = ", ".join(str(tuple(rows.shape)) for rows in (before, after, teacher))
        raise InputError(f"student before and after the step and teacher must have one shape [N, vocab], got {shapes}")
    if labels is not None and labels.shape != before.shape[:1]:
        raise InputError(f"labels must be [N] = [{len(before)}], got {tuple(labels.shape)}")
    q, after, p = (rows.double().exp() for rows in (before, after, teacher))
    change = after - q
    top = p.topk(min(top_k, p.shape[-1]), dim=-1)
    flows = {
        "moved": change.abs().sum(-1) / 2,
        "over_to_under": torch.where(p > q, change, 0.0).sum(-1),
        "into_top": change.gather(-1, top.indices).sum(-1),
        "into_tail": torch.where(p < TAIL_RATIO * top.values[:, :1], change, 0.0).sum(-1),
        "misplaced": (p - q).abs().sum(-1) / 2,
        "misplaced_after": (p - after).abs().sum(-1) / 2,
    }
    if labels is not None:
        flows["into_target"] = change.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return flows


def _error_buckets(before: Tensor, teacher: Tensor) -> Tensor:
    """The index of each class's bucket, `[N, vocab]`; a class at -inf in both rows has nothing to add to its bucket."""
    error = teacher.double() - before.double()
    return torch.bucketize(error, torch.tensor(ERROR_EDGES, dtype=error.dtype, device=error.device), right=True)


def _buckets(kind: str, labels: tuple[str, ...], sums: dict[str, Tensor], num_rows: int) -> Buckets:
    student, teacher, moved = (
        tuple((sums[f"{kind} {name}"] / num_rows).tolist()) for name in ("student", "teacher", "moved")
    )
    gradient = sums.get(f"{kind} gradient")
    share = None if gradient is None or gradient.sum() == 0 else tuple((gradient / gradient.sum()).tolist())
    return Buckets(labels, student, teacher, moved, share)
