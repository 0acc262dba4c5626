import re

import pytest
import torch

from abkd.explore.effects import effects
from abkd.explore.rows import rows_of
from abkd.explore.sentences import CONFIDENCE, HARDNESS, sentences
from abkd.explore.toys import TOYS


def said(row, alpha, beta):
    return sentences(row, effects(student=row.student, teacher=row.teacher, alpha=alpha, beta=beta))


@pytest.mark.parametrize("row", TOYS[:4], ids=lambda row: row.name)
def test_the_four_corners_differ_in_one_thing_at_a_time(row):
    at_size, hard, unseen, trusted = (
        "takes every error at its size",
        "very hard",
        "does not look at",
        "confidence fully",
    )
    for (alpha, beta), words in {
        (1.0, 0.0): (at_size, unseen),
        (0.0, 0.0): (hard, unseen),
        (1.0, 1.0): (at_size, trusted),
        (0.0, 1.0): (hard, trusted),
    }.items():
        first = said(row, alpha, beta)[0]
        assert all(word in first for word in words), first
    assert said(row, 0.2, 0.7)[0] == (
        "This point chases large errors hard, and trusts the student's own confidence a good deal."
    )


@pytest.mark.parametrize("scale, along", [(HARDNESS, "alpha"), (CONFIDENCE, "beta")])
def test_words_change_in_order_along_the_plane(scale, along):
    steps = [step / 20 for step in range(-6, 27)]
    points = [(1.0 - t, 0.5) if along == "alpha" else (0.5, t) for t in steps]
    first = [said(TOYS[0], *point)[0] for point in points]
    found = [next(i for i, (_, words) in enumerate(scale) if words in line) for line in first]
    assert found == sorted(found, reverse=True) and len(set(found)) == len(scale)


def test_the_numbers_in_the_words_are_the_rows():
    row = TOYS[0]
    p, q = row.teacher.exp().numpy(), row.student.exp().numpy()
    line = said(row, 0.2, 0.7)[1]
    worst, favourite, middling = (int(number) for number in re.findall(r"class (\d+)", line))
    assert worst == abs(p - q).argmax() and favourite == q.argmax() and q[middling] == sorted(q)[19]
    chased, trusted = (float(number) for number in re.findall(r"([\d.]+) times", line))
    assert chased == pytest.approx(abs(p[worst] ** 0.2 - q[worst] ** 0.2) / 0.2 / abs(p[worst] - q[worst]), rel=0.05)
    assert trusted == pytest.approx((q[favourite] / q[middling]) ** 0.7, rel=0.05)


def test_mass_goes_where_the_shift_says():
    row = TOYS[2]
    found = effects(student=row.student, teacher=row.teacher, alpha=1.0, beta=0.0)
    into, out = int(found.shift.argmax()), int(found.shift.argmin())
    share = row.teacher[into].exp().item()
    assert f"into class {into} (teacher {share:.1%}," in sentences(row, found)[2]
    assert f"out of class {out} (" in sentences(row, found)[2]


@pytest.mark.parametrize(
    "alpha, beta, words",
    [(1.0, 0.0, "the student gives 0 to class 6"), (0.0, 1.0, "the teacher gives 0 to class 0"), (0.2, 0.7, None)],
)
def test_infinity_is_explained(alpha, beta, words):
    lines = said(TOYS[-1], alpha, beta)
    assert ("D is infinite here" in lines[0]) == (words is not None)
    if words:
        assert words in lines[0] and len(lines) == 4


def test_without_an_error_there_is_nothing_to_chase():
    logits = torch.randn(1, 12)
    (same,) = rows_of(student_logits=logits, teacher_logits=logits, names=["same"])
    assert "no error to chase" in said(same, 0.2, 0.7)[0]
    (uniform,) = rows_of(student_logits=torch.zeros(1, 12), teacher_logits=logits, names=["uniform"])
    assert "does not look at" in said(uniform, 0.2, 0.7)[0]


def test_extreme_rows_get_sentences_too():
    logits = torch.tensor([[0.0, -900.0, -2000.0, 5.0], [5.0, -800.0, -10.0, 0.0]])
    (row,) = rows_of(
        student_logits=logits[:1], teacher_logits=logits[1:], names=["extreme"], label_of=lambda i: f" t{i}"
    )
    for alpha in (-4.0, 0.0, 0.2, 1.0, 4.0):
        for beta in (-4.0, 0.0, 0.7, 4.0):
            lines = said(row, alpha, beta)
            assert len(lines) >= 3 and all("nan" not in line and "\n" not in line for line in lines)
