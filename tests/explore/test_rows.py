import math

import pytest
import torch

from abkd import InputError
from abkd.explore.rows import REST, rows_of
from abkd.explore.toys import TOYS

TEACHER = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0]])
STUDENT = torch.tensor([[0.0, 4.0, 0.0, 0.0, 0.0, 3.0, 5.0]])


def rows(student=STUDENT, teacher=TEACHER, **options):
    return rows_of(student_logits=student, teacher_logits=teacher, names=["a"] * len(student), **options)


def test_the_teachers_top_then_the_students_then_the_rest():
    (row,) = rows(label_of="<{}>".format, num_teacher=2, num_student=3)
    assert row.labels == ("<0>", "<1>", "<6>", "<5>", REST) and row.is_own
    for found, logits in ((row.student, STUDENT), (row.teacher, TEACHER)):
        probabilities = logits[0].double().softmax(-1)
        torch.testing.assert_close(found[:4].exp(), probabilities[[0, 1, 6, 5]])
        assert found[4].exp().item() == pytest.approx(probabilities[[2, 3, 4]].sum().item())
        assert found.exp().sum().item() == pytest.approx(1)


def test_what_cannot_be_seen_in_a_label_is_shown_by_signs():
    labels = [" Paris", "", "\n\n", "a b", "x", "\ty", "z"]
    (row,) = rows(label_of=labels.__getitem__)
    assert row.labels == ("␣Paris", "∅", "⏎⏎", "a␣b", "x", "⇥y", "z")


def test_a_small_vocabulary_has_no_rest():
    (row,) = rows()
    assert row.labels == tuple("0123456") and len(row.student) == 7


def test_the_defaults_show_at_most_thirty_five_and_the_rest():
    logits = torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0))
    for row in rows(logits[0], logits[1]):
        assert 31 <= len(row.labels) <= 36 and row.labels[-1] == REST and len(set(row.labels)) == len(row.labels)
        assert (row.teacher[:30].diff() <= 0).all()


def test_a_forbidden_class_stays_at_zero():
    student = STUDENT.clone()
    student[0, 0] = -math.inf
    (row,) = rows(student, num_teacher=2, num_student=1)
    assert row.student[0].isneginf() and row.knobs.isfinite().all()
    assert row.moved(torch.tensor([0.5], dtype=torch.float64))[0].isneginf()
    both = torch.tensor([[0.0, 1.0, -math.inf, -math.inf]])
    (row,) = rows(both, both, num_teacher=2, num_student=0)
    assert row.labels == ("1", "0", REST) and row.student[2].isneginf() and row.teacher[2].isneginf()


@pytest.mark.parametrize(
    "student, teacher, message",
    [
        (STUDENT, TEACHER[:, :5], r"student_logits \(1, 7\) and teacher_logits \(1, 5\) must have one shape"),
        (STUDENT[0], TEACHER[0], "one shape"),
        (STUDENT * math.nan, TEACHER, "student_logits: row 0 has NaN"),
        (STUDENT, TEACHER + math.inf, "teacher_logits: row 0 has NaN, \\+inf"),
        (STUDENT - math.inf, TEACHER, "student_logits: row 0"),
    ],
)
def test_bad_logits_are_refused(student, teacher, message):
    with pytest.raises(InputError, match=message) as caught:
        rows(student, teacher)
    assert "\n" not in str(caught.value)


def test_a_name_for_each_row():
    with pytest.raises(InputError, match="names: 2 of them for 1 rows"):
        rows_of(student_logits=STUDENT, teacher_logits=TEACHER, names=["a", "b"])


@pytest.mark.parametrize("row", TOYS, ids=lambda row: row.name)
def test_the_built_in_rows_are_distributions_of_one_size(row):
    assert row.student.shape == row.teacher.shape == row.knobs.shape[:1] == (len(row.labels),) and not row.is_own
    for log_probabilities in (row.student, row.teacher, row.moved(torch.ones(row.knobs.shape[1], dtype=torch.float64))):
        assert log_probabilities.exp().sum().item() == pytest.approx(1)
    torch.testing.assert_close(row.moved(torch.zeros(row.knobs.shape[1], dtype=torch.float64)), row.student)
