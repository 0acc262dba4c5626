"""What a point of the plane does to a student, in words that its numbers choose."""

import math

import torch
from torch import Tensor

from abkd.explore.effects import Effects, hardness
from abkd.explore.rows import Row

HARDNESS = (
    (1.02, "chases large errors even harder than reverse KL does"),
    (0.9, "chases large errors very hard"),
    (0.6, "chases large errors hard"),
    (0.3, "chases large errors moderately hard"),
    (0.02, "chases large errors a little harder than their size"),
    (-0.02, "takes every error at its size"),
    (-math.inf, "plays errors down below their size"),
)
"""(least strength, words): 0 is the hardness of forward KL at the row's largest error, 1 that of reverse KL."""
CONFIDENCE = (
    (1.02, "trusts the student's own confidence more than fully"),
    (0.9, "trusts the student's own confidence fully"),
    (0.6, "trusts the student's own confidence a good deal"),
    (0.3, "trusts the student's own confidence somewhat"),
    (0.02, "trusts the student's own confidence little"),
    (-0.02, "does not look at the student's own confidence"),
    (-math.inf, "turns the student's own confidence upside down: what it holds for unlikely counts most"),
)
"""(least strength, words): 0 where all its classes count alike, as in forward KL, 1 where they count as q."""


def sentences(row: Row, found: Effects) -> list[str]:
    """Two or three of them: why D is infinite, where it is; the two effects; where a small step moves mass."""
    said = _of_infinity(row, found)
    there = row.student.isfinite() & row.teacher.isfinite()
    errors = hardness(student=row.student, teacher=row.teacher, alpha=1.0).masked_fill(~there, 0.0)
    if bool((errors == 0).all()):
        return [*said, "Wherever both give a probability the student is the teacher: there is no error to chase."]
    worst, favourite = int(errors.argmax()), int(row.student.argmax())
    median = int(row.student.masked_fill(~there, math.inf).argsort()[(int(there.sum()) - 1) // 2])
    chased = (found.hardness[worst] / errors[worst]).item()
    fully_chased = (row.teacher[worst] - row.student[worst]).abs().item() / errors[worst].item()
    trusted = (found.confidence[favourite] / found.confidence[median]).item()
    fully_trusted = (row.student[favourite] - row.student[median]).item()
    said.append(
        f"This point {_words(HARDNESS, _share(chased, math.log(fully_chased)))}, and "
        f"{_words(CONFIDENCE, _share(trusted, fully_trusted))}."
    )
    said.append(
        f"The largest error, at {_class(row, worst)}, counts {_times(chased)} what it does under forward KL; the "
        f"student's favourite, {_class(row, favourite)}, counts {_times(trusted)} what its middling "
        f"{_class(row, median)} does."
    )
    return [*said, _of_shift(row, found.shift)]


def _of_infinity(row: Row, found: Effects) -> list[str]:
    if math.isfinite(found.value):
        return []
    index = int(found.class_values.isinf().int().argmax())
    if row.student[index].isneginf():
        reason = f"the student gives 0 to {_class(row, index)}, which is finite only for β > 0 and α + β > 0"
    elif row.teacher[index].isneginf():
        reason = f"the teacher gives 0 to {_class(row, index)}, which is finite only for α > 0 and α + β > 0"
    else:
        reason = f"a power at {_class(row, index)} is too large for a number"
    return [f"D is infinite here: {reason}."]


def _of_shift(row: Row, shift: Tensor) -> str:
    if not bool((shift != 0).any()):
        return "A small step moves no mass."
    into, out = int(shift.argmax()), int(shift.argmin())
    return f"A small step moves mass most into {_beliefs(row, into)} and out of {_beliefs(row, out)}."


def _beliefs(row: Row, index: int) -> str:
    p, q = row.teacher[index].exp().item(), row.student[index].exp().item()
    return f"{_class(row, index)} (teacher {p:.1%}, student {q:.1%})"


def _class(row: Row, index: int) -> str:
    label = row.labels[index]
    return f"“{label}”" if row.is_own else f"class {label}"


def _share(ratio: float, log_whole: float) -> float:
    """ln ratio as a share of `log_whole`; 0 where that is 0: a student without preference has none to trust."""
    return math.log(ratio) / log_whole if log_whole and ratio else 0.0


def _words(scale: tuple[tuple[float, str], ...], strength: float) -> str:
    return next(words for least, words in scale if strength >= least)


def _times(ratio: float) -> str:
    text = f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2g}"
    return "just" if text == "1" else f"{text} times"


def largest_change(shift: Tensor) -> int:
    """The class whose mass a small step changes most."""
    return int(torch.argmax(shift.abs()))
