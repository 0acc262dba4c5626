"""Where the mass goes, against loops over classes in plain Python."""

import math

import pytest
import torch

from abkd import InputError
from abkd.analysis.mass import RANK_EDGES
from abkd.analysis.movement import ERROR_EDGES, ERROR_LABELS, MassMeter, mass_scalars, mass_step
from abkd.calibrations import DIST, Plain
from abkd.divergences import AlphaBeta, ForwardKL, ReverseKL


def rows(num_rows, vocab, scale=2.0):
    return scale * torch.randn(num_rows, vocab, dtype=torch.float64)


def softmax(logits):
    top = max(logits)
    parts = [math.exp(x - top) for x in logits]
    return [x / sum(parts) for x in parts]


def by_hand(student, teacher, labels, step_size, top_k):
    """A forward KL's step, row by row and class by class: logits + step_size * (p - q)."""
    num_rows, vocab = student.shape
    names = ["moved", "over_to_under", "into_target", "into_top", "into_tail", "misplaced", "misplaced_after"]
    found = dict.fromkeys(names, 0.0)
    kinds = {"rank": len(RANK_EDGES), "error": len(ERROR_LABELS)}
    sums = {kind: {key: [0.0] * count for key in ("q", "p", "moved", "g")} for kind, count in kinds.items()}
    for z, t, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        q, p = softmax(z), softmax(t)
        after = softmax([x + step_size * (a - b) for x, a, b in zip(z, p, q, strict=True)])
        order = sorted(range(vocab), key=lambda k: -p[k])
        for k in range(vocab):
            change = after[k] - q[k]
            rank = order.index(k) + 1
            found["moved"] += abs(change) / 2
            found["over_to_under"] += change * (p[k] > q[k])
            found["into_target"] += change * (k == label)
            found["into_top"] += change * (rank <= top_k)
            found["into_tail"] += change * (p[k] < 0.01 * max(p))
            found["misplaced"] += abs(p[k] - q[k]) / 2
            found["misplaced_after"] += abs(p[k] - after[k]) / 2
            places = {
                "rank": sum(rank >= edge for edge in RANK_EDGES) - 1,
                "error": sum(math.log(p[k] / q[k]) >= edge for edge in ERROR_EDGES),
            }
            for kind, place in places.items():
                for key, value in {"q": q[k], "p": p[k], "moved": change, "g": abs(p[k] - q[k])}.items():
                    sums[kind][key][place] += value / num_rows
    for kind in kinds:
        total = sum(sums[kind]["g"])
        sums[kind]["g"] = [x / total for x in sums[kind]["g"]]
    return {name: value / num_rows for name, value in found.items()}, sums


def test_every_number_equals_a_slow_loop():
    torch.manual_seed(0)
    student, teacher, labels = rows(5, 130), rows(5, 130), torch.tensor([3, 0, 129, 77, 3])
    step = mass_step(ForwardKL(), student=student, teacher=teacher, labels=labels, step_size=3.0, top_k=4)
    numbers, sums = by_hand(student, teacher, labels, 3.0, 4)
    assert step.num_rows == 5
    for name, expected in numbers.items():
        assert getattr(step, name) == pytest.approx(expected, abs=1e-12), name
    for kind in ("rank", "error"):
        buckets = getattr(step, f"by_{kind}")
        assert len(buckets.labels) == len(buckets.student)
        for key, name in {"q": "student", "p": "teacher", "moved": "moved", "g": "gradient_share"}.items():
            assert getattr(buckets, name) == pytest.approx(sums[kind][key], abs=1e-12), (kind, name)


@pytest.mark.parametrize("divergence", [AlphaBeta(), ReverseKL(), Plain(AlphaBeta(0.8, 0.3), temperature=4.0)], ids=str)
def test_the_books_balance(divergence):
    student, teacher = rows(6, 1500), rows(6, 1500)
    step = mass_step(divergence, student=student, teacher=teacher, step_size=0.5)
    assert step.into_target is None
    assert 0 < step.over_to_under <= step.moved
    assert step.misplaced_after < step.misplaced
    for buckets in (step.by_rank, step.by_error):
        assert sum(buckets.moved) == pytest.approx(0, abs=1e-12)
        for parts in (buckets.student, buckets.teacher, buckets.gradient_share):
            assert sum(parts) == pytest.approx(1, abs=1e-12)
    under = sum(step.by_error.moved[ERROR_LABELS.index("0 to 0.3") :])
    assert under == pytest.approx(step.over_to_under, abs=1e-12)


@pytest.mark.parametrize("divergence", [AlphaBeta(), DIST()], ids=str)
def test_chunks_change_nothing(divergence, monkeypatch):
    student, teacher, labels = rows(7, 50), rows(7, 50), torch.arange(7)
    meter = MassMeter(divergence)
    meter(student, teacher, labels)
    whole = meter.result()
    monkeypatch.setattr("abkd.analysis.movement._CHUNK_ELEMENTS", 100)  # two rows
    found = mass_step(divergence, student=student, teacher=teacher, labels=labels)
    assert found.moved == pytest.approx(whole.moved, rel=1e-12)
    assert found.by_error.gradient_share == pytest.approx(whole.by_error.gradient_share, rel=1e-12)


def test_an_edge_belongs_to_the_bucket_above_it():
    student = torch.full((1, 4), -2.0)  # so that the differences are exact
    meter = MassMeter()
    meter.add(before=student, after=student, teacher=student + torch.tensor([0.0, 1.0, -1.0, 0.5]))
    mass = math.exp(-2)
    assert meter.result().by_error.student == pytest.approx((0, 0, mass, 0, mass, mass, mass, 0))


def test_a_step_that_was_made_counts_like_one_that_is_computed():
    student, teacher = rows(4, 30), rows(4, 30)
    computed = mass_step(AlphaBeta(), student=student, teacher=teacher, step_size=0.2)
    logits = student.clone().requires_grad_()
    log_p = teacher.log_softmax(-1)
    AlphaBeta()(student=logits.log_softmax(-1), teacher=log_p).sum().backward()
    torch.optim.SGD([logits], lr=0.2).step()
    meter = MassMeter()
    meter.add(before=student.log_softmax(-1), after=logits.detach().log_softmax(-1), teacher=log_p)
    made = meter.result()
    assert made.by_rank.gradient_share is None
    assert made[1:8] == pytest.approx(computed[1:8])
    assert made.by_error.moved == pytest.approx(computed.by_error.moved)


def test_scalars_are_those_of_the_step():
    student, teacher, labels = rows(4, 30).float(), rows(4, 30).float(), torch.tensor([1, 2, 3, 4])
    step = mass_step(AlphaBeta(), student=student, teacher=teacher, labels=labels)._asdict()
    scalars = mass_scalars(AlphaBeta(), student=student, teacher=teacher, labels=labels)
    names = ("moved", "over_to_under", "into_top", "into_tail", "misplaced", "into_target")
    assert scalars == pytest.approx({f"mass_{name}": step[name] for name in names})
    assert "mass_into_target" not in mass_scalars(AlphaBeta(), student=student, teacher=teacher)


def test_a_student_that_is_its_teacher_moves_nothing():
    teacher = rows(3, 20)
    step = mass_step(AlphaBeta(), student=teacher, teacher=teacher)
    assert (step.moved, step.over_to_under, step.misplaced) == pytest.approx((0, 0, 0), abs=1e-15)
    assert step.by_rank.gradient_share is None


def test_forbidden_classes_hold_and_move_nothing():
    student, teacher = rows(3, 20), rows(3, 20)
    alone = mass_step(AlphaBeta(), student=student, teacher=teacher)
    padding = torch.full((3, 5), -math.inf, dtype=torch.float64)
    padded = mass_step(
        AlphaBeta(), student=torch.cat([student, padding], -1), teacher=torch.cat([teacher, padding], -1)
    )
    assert padded[1:3] == pytest.approx(alone[1:3]) and padded.misplaced == pytest.approx(alone.misplaced)
    assert padded.by_error.moved == pytest.approx(alone.by_error.moved)


def test_a_meter_reads_rows_as_they_come():
    student, teacher = rows(4, 30).log_softmax(-1), rows(4, 30).log_softmax(-1)
    meter = MassMeter(ReverseKL())
    with torch.no_grad():
        meter(student[:1], teacher[:1])
        meter(student[1:], teacher[1:])
    whole = mass_step(ReverseKL(), student=student, teacher=teacher)
    assert meter.result().moved == pytest.approx(whole.moved)


def test_what_does_not_fit_is_named():
    student, teacher = rows(2, 5), rows(2, 5)
    with pytest.raises(InputError, match="no rows"):
        MassMeter(AlphaBeta()).result()
    with pytest.raises(InputError, match="top_k must be at least 1, got 0"):
        MassMeter(AlphaBeta(), top_k=0)
    with pytest.raises(InputError, match="no divergence to step by"):
        MassMeter()(student, teacher)
    with pytest.raises(InputError, match=r"labels must be \[N\] = \[2\], got \(3,\)"):
        mass_scalars(AlphaBeta(), student=student, teacher=teacher, labels=torch.zeros(3, dtype=torch.int64))
    meter = MassMeter(AlphaBeta())
    meter(student, teacher)
    with pytest.raises(InputError, match="with all rows"):
        meter(student, teacher, torch.tensor([0, 1]))
    with pytest.raises(InputError, match="one shape"):
        meter.add(before=student, after=student, teacher=teacher[:, :-1])
