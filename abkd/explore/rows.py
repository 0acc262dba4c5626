"""One teacher's and one student's distribution over a few classes, and how that student may move."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abkd.errors import InputError

REST = "rest"
"""The label of the class that holds all classes that are not shown one by one."""


@dataclass(frozen=True, eq=False)
class Row:
    """ln p and ln q, `[classes]` in fp64; the student's family is softmax(ln q + knobs θ), θ of `[num_knobs]`."""

    name: str
    about: str
    """One sentence for the page."""
    labels: tuple[str, ...]
    student: Tensor
    teacher: Tensor
    knobs: Tensor
    """`[classes, num_knobs]`, finite: what one unit of each knob adds to the logits."""
    is_own: bool = False
    """Whether it is of the user's models."""

    def moved(self, knobs: Tensor) -> Tensor:
        """Log-probabilities `[classes]` of the family's student at θ; at 0 the one that is shown."""
        return (self.student + self.knobs @ knobs).log_softmax(-1)


def rows_of(
    *,
    student_logits: Tensor,
    teacher_logits: Tensor,
    names: Sequence[str],
    label_of: Callable[[int], str] = str,
    num_teacher: int = 30,
    num_student: int = 5,
) -> list[Row]:
    """The teacher's `num_teacher` most probable classes, then the student's own favourites, then `REST`, their sum.

    Args:
        student_logits, teacher_logits: `[N, vocab]`, one row a token (or a sample).
        names: N of them, for the page's menu: what is predicted there, as in "The capital of France is ...".
        label_of: from a class's number to what is written under it, as `tokenizer.decode`; spaces and line ends in it
            are shown by signs.
        num_teacher: >= 1; a vocabulary that small has no rest.
        num_student: >= 0, of the student's most probable classes; those among the teacher's are not shown twice.

    Returns:
        N rows. The divergence of a row is that of these classes, with the rest as one of them, not of the vocabulary.
        Its student has one knob, its temperature: it can become surer or less sure, and keeps its ranking.

    Raises:
        InputError: the shapes differ; a logit is NaN or +inf; a row is -inf everywhere.
    """
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise InputError(
            f"student_logits {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)} must have "
            "one shape [N, vocab]"
        )
    if len(names) != len(student_logits):
        raise InputError(f"names: {len(names)} of them for {len(student_logits)} rows of logits; give one a row")
    student, teacher = (
        _log_probabilities(field, logits)
        for field, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits))
    )
    return [
        _row(name, log_q, log_p, label_of, (num_teacher, num_student))
        for name, log_q, log_p in zip(names, student, teacher, strict=True)
    ]


def _log_probabilities(field: str, logits: Tensor) -> Tensor:
    logits = logits.detach().to("cpu", torch.float64)
    for number, row in enumerate(logits):
        if bool(row.isnan().any() | row.isposinf().any() | row.isneginf().all()):
            raise InputError(
                f"{field}: row {number} has NaN, +inf, or -inf alone; give finite logits, -inf where forbidden"
            )
    return logits.log_softmax(-1)


def _row(
    name: str, student: Tensor, teacher: Tensor, label_of: Callable[[int], str], num_shown: tuple[int, int]
) -> Row:
    of_teacher, of_student = (
        row.topk(min(count, len(row))).indices.tolist()
        for row, count in zip((teacher, student), num_shown, strict=True)
    )
    shown = list(dict.fromkeys(of_teacher + of_student))
    left = torch.ones(len(teacher), dtype=torch.bool)
    left[shown] = False
    labels = [_seen(label_of(index)) for index in shown]
    student, teacher = (torch.cat([row[shown], row[left].logsumexp(-1, keepdim=True)]) for row in (student, teacher))
    if not left.any():
        student, teacher = student[:-1], teacher[:-1]
    else:
        labels.append(REST)
    temperature = student.masked_fill(student.isneginf(), 0.0).unsqueeze(-1)
    about = (
        f"The teacher's {len(of_teacher)} most probable classes, the student's own favourites, the rest. To land, the "
        "student can only become surer or less sure."
    )
    return Row(name, about, tuple(labels), student, teacher, temperature, is_own=True)


def _seen(label: str) -> str:
    """With signs for what cannot be seen."""
    signs = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
    return "".join(signs.get(character, character) for character in label) or "∅"
