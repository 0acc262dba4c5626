"""The paper's statements on random rows and on rows made to break them; docs/theorems.md recomputed in 40 digits."""

import re
from functools import partial
from pathlib import Path

import mpmath
import pytest
import torch

from abkd import InputError
from abkd.analysis.theorems import (
    Constants,
    Rows,
    confidence_focus,
    identric_mean,
    logarithmic_mean,
    proposition_3_1,
    proposition_4_2,
    proposition_f_2,
    theorem_3_2,
    theorem_d_1,
    theorem_f_3,
)

PAGE = (Path(__file__).parents[2] / "docs/theorems.md").read_text(encoding="utf-8")
PAIRS_OF_ALPHA = [(0.0, 1.0), (0.0, 0.2), (0.2, 0.5), (0.5, 1.0)]
PRINTED = Constants(delta_1=0.07)


def logits(vocab, scale, num_rows=150):
    return scale * torch.randn(num_rows, vocab, dtype=torch.float64)


def random_rows():
    """(student, teacher) log-probabilities: few and many classes, flat and peaked, far apart and nearly equal."""
    torch.manual_seed(0)
    for vocab in (2, 3, 30):
        for scale in (0.1, 1.0, 6.0):
            student, teacher = logits(vocab, scale), logits(vocab, scale)
            yield student.log_softmax(-1), teacher.log_softmax(-1)
            yield student.log_softmax(-1), (student + 1e-4 * teacher).log_softmax(-1)


def pairs(equal, num_rows=600):
    """Random rows, flat and peaked; the first two classes are equal in one side of them, "q" or "p"."""
    torch.manual_seed(1)
    first, second = torch.zeros(num_rows, dtype=torch.int64), torch.ones(num_rows, dtype=torch.int64)
    for vocab in (3, 4, 20):
        for scale in (0.5, 2.0, 5.0):
            student, teacher = logits(vocab, scale, num_rows), logits(vocab, scale, num_rows)
            side = student if equal == "q" else teacher
            side[:, 1] = side[:, 0]
            yield Rows(student.log_softmax(-1), teacher.log_softmax(-1), first, second)


def count(statement, equal):
    """(number of rows with the premises, number of counter-examples)."""
    verdicts = [statement(rows) for rows in pairs(equal)]
    return sum(int(v.premises.sum()) for v in verdicts), sum(int(v.counterexamples.sum()) for v in verdicts)


@pytest.mark.parametrize("step_size", [1e-6, 1.0, 100.0])
def test_the_bounds_hold_for_every_class(step_size):
    for student, teacher in random_rows():
        given = dict(student=student, teacher=teacher, step_size=step_size)
        verdicts = [proposition_3_1(**given, reverse=reverse) for reverse in (False, True)]
        verdicts += [proposition_f_2(**given, alpha=alpha) for alpha in (0.0, 0.3, 1.0)]
        verdicts += [
            proposition_4_2(**given, alpha=alpha, beta=beta) for alpha, beta in ((0.2, 0.7), (1, 1), (0, 0), (-1, 2))
        ]
        for verdict in verdicts:
            assert verdict.premises.all() and verdict.slack.shape == student.shape
            assert not verdict.counterexamples.any()


def test_the_bounds_are_those_of_the_paper():
    q, p, eta = [0.2, 0.5, 0.3], [0.6, 0.3, 0.1], mpmath.mpf("0.5")
    student, teacher = (torch.tensor([row], dtype=torch.float64).log() for row in (q, p))

    def slack(bounds, gradient):
        shared = -mpmath.log(sum(a * mpmath.exp(-eta * g) for a, g in zip(q, gradient, strict=True)))
        return [float(b + abs(shared) - abs(shared - eta * g)) for b, g in zip(bounds, gradient, strict=True)]

    forward = slack([eta * abs(a - b) for a, b in zip(p, q, strict=True)], [b - a for a, b in zip(p, q, strict=True)])
    verdict = proposition_3_1(student=student, teacher=teacher, reverse=False, step_size=0.5)
    assert verdict.slack[0].tolist() == pytest.approx(forward, abs=1e-14)

    logs = [mpmath.log(mpmath.mpf(a) / b) for a, b in zip(p, q, strict=True)]
    mean = sum(b * u for b, u in zip(q, logs, strict=True))
    spread = sum(b * abs(u) for b, u in zip(q, logs, strict=True))
    reverse = slack(
        [eta * b * (abs(u) + spread) for b, u in zip(q, logs, strict=True)],
        [b * (mean - u) for b, u in zip(q, logs, strict=True)],
    )
    for verdict in (
        proposition_3_1(student=student, teacher=teacher, reverse=True, step_size=0.5),
        proposition_f_2(student=student, teacher=teacher, alpha=0.0, step_size=0.5),
        proposition_4_2(student=student, teacher=teacher, alpha=0.0, beta=1.0, step_size=0.5),
    ):
        assert verdict.slack[0].tolist() == pytest.approx(reverse, abs=1e-14)


def test_cases_that_hold():
    for case, equal in ((2, "q"), (3, "p")):
        num_rows, failures = count(partial(theorem_3_2, case), equal)
        assert num_rows > 100 and failures == 0, case
    for alphas in PAIRS_OF_ALPHA:
        num_rows, failures = count(partial(theorem_f_3, 2, alphas=alphas), "q")
        assert num_rows > 100 and failures == 0, alphas
        for beta in (0.0, 0.7, 1.5):
            for case in (1, 2):
                num_rows, failures = count(partial(theorem_d_1, case, alphas=alphas, beta=beta), "q")
                assert num_rows > 100 and failures == 0, (case, alphas, beta)


def test_cases_that_fail_as_printed():
    for case, equal in ((1, "q"), (4, "p")):
        num_rows, failures = count(partial(theorem_3_2, case, constants=PRINTED), equal)
        assert 0.05 * num_rows < failures < 0.95 * num_rows, case
    for alphas in PAIRS_OF_ALPHA[:3]:
        for case, equal in ((1, "q"), (3, "p"), (4, "p")):
            num_rows, failures = count(partial(theorem_f_3, case, constants=PRINTED, alphas=alphas), equal)
            assert failures == 0 if (case, alphas) == (3, (0.0, 1.0)) else failures > 0, (case, alphas)


def test_case_1_holds_where_q_is_above_the_logarithmic_mean():
    for rows in pairs("q"):
        p1, p2, q1, _ = rows.pairs
        mean = logarithmic_mean(p1, p2)
        assert bool(((mean > torch.minimum(p1, p2)) & (mean < torch.maximum(p1, p2))).all())
        verdict = theorem_3_2(1, rows, Constants(zeta=0.0, delta_1=1.0))
        under = (q1 < p1) & (p1 > p2)
        assert torch.equal((verdict.slack >= 0)[under], (q1 >= mean)[under])
        assert not theorem_3_2(1, rows, Constants(delta_1=mean)).counterexamples.any()


def test_case_4_holds_where_p_is_large_enough():
    for rows in pairs("p"):
        p1, _, q1, q2 = rows.pairs
        kl = (rows.student.exp() * (rows.student - rows.teacher)).sum(-1)
        mean = identric_mean(q1, q2)
        assert bool(((mean > torch.minimum(q1, q2)) & (mean < torch.maximum(q1, q2))).all())
        verdict = theorem_3_2(4, rows, Constants(zeta=0.0, c0=1.0, c1=1.0))
        assert torch.equal(verdict.conclusion[verdict.premises], (p1.log() + kl >= mean.log())[verdict.premises])
        assert not theorem_3_2(4, rows, Constants(c0=mean / q2)).counterexamples.any()


@pytest.mark.parametrize("delta_1", [1e-6, 1e-3, 0.05, 0.2])
def test_no_number_delta_1_saves_case_1(delta_1):
    p = [1 - 1.2 * delta_1, 0.99 * delta_1]
    q = [1.01 * delta_1] * 2
    rows = two_of_three(p, q)
    assert theorem_3_2(1, rows, Constants(zeta=0.5, delta_1=delta_1)).counterexamples.all()


@pytest.mark.parametrize("zeta, fails", [(0.02, True), (0.1, True), (0.15, True), (0.2, False)])
def test_case_3_along_the_line_fails_for_small_zeta(zeta, fails):
    torch.manual_seed(2)
    q2 = 10 ** -torch.linspace(1, 20, 40, dtype=torch.float64)
    p = torch.linspace(1.11 * (zeta + 0.1), 0.499, 40, dtype=torch.float64)
    q2, p = (x.flatten() for x in torch.meshgrid(q2, p, indexing="ij"))
    rows = two_of_three([p, p], [q2 + zeta, q2])
    verdicts = [theorem_f_3(3, rows, Constants(zeta=zeta * (1 - 1e-9)), alphas=a) for a in PAIRS_OF_ALPHA]
    assert all(int(verdict.premises.sum()) > 300 for verdict in verdicts)
    assert any(bool(verdict.counterexamples.any()) for verdict in verdicts) == fails


def test_the_weights_follow_the_students_confidence_and_the_gradient_does_not_always():
    num_failures = num_rows = 0
    for student, teacher in random_rows():
        for alpha in (0.0, 0.2, 1.0):
            for betas in ((0.0, 0.5), (0.2, 0.7), (-1.0, 2.0)):
                given = dict(student=student, teacher=teacher, alpha=alpha, betas=betas)
                verdict = confidence_focus(**given)
                assert verdict.premises.all() and not verdict.counterexamples.any()
                of_gradient = confidence_focus(**given, of="gradient")
                num_failures += int(of_gradient.counterexamples.sum())
                num_rows += len(student)
    assert 0.005 < num_failures / num_rows < 0.2


def two_of_three(p, q):
    """`Rows` of three classes, from the probabilities of the first two."""

    def log(pair):
        first, second = (torch.as_tensor(x, dtype=torch.float64).reshape(-1) for x in pair)
        return torch.stack([first, second, 1 - first - second], -1).log()

    teacher, student = log(p), log(q)
    zeros = torch.zeros(len(teacher), dtype=torch.int64)
    return Rows(student, teacher, zeros, zeros + 1)


def delta(p, q, alpha, beta):
    """Delta / eta by hand: w(y1) - w(y2) - (q(y1) - q(y2)) sum w."""
    with mpmath.workdps(40):
        p, q, a, b = [mpmath.mpf(x) for x in p], [mpmath.mpf(x) for x in q], mpmath.mpf(alpha), mpmath.mpf(beta)
        error = [mpmath.log(x / y) if a == 0 else (x**a - y**a) / a for x, y in zip(p, q, strict=True)]
        w = [y**b * e for y, e in zip(q, error, strict=True)]
        return float(w[0] - w[1] - (q[0] - q[1]) * sum(w))


def numbers(text):
    return [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", text)]


LINES = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.split("## Counter-examples")[1].splitlines()
    if line.startswith("| Thm")
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[0])
def test_counter_examples_of_the_page(line):
    name, *cells = line
    p, q, larger, printed, smaller, other = map(numbers, cells)
    assert sum(p) == pytest.approx(1) and sum(q) == pytest.approx(1)
    assert delta(p, q, *larger) == pytest.approx(printed[0], abs=6e-4)
    assert delta(p, q, *smaller) == pytest.approx(other[0], abs=6e-4)
    assert printed < other
    theorem = re.fullmatch(r"Thm (3\.2|F\.3), case (\d)", name)
    if theorem is None:  # the informal statement has no premises of its own: both are over-estimated
        assert p[0] < q[0] and p[1] < q[1]
        return
    rows = two_of_three(p[:2], q[:2])
    case = int(theorem[2])
    verdict = (
        theorem_3_2(case, rows, PRINTED)
        if theorem[1] == "3.2"
        else theorem_f_3(case, rows, PRINTED, alphas=(larger[0], smaller[0]))
    )
    assert verdict.counterexamples.all()
    assert verdict.slack.item() == pytest.approx(delta(p, q, *larger) - delta(p, q, *smaller), abs=1e-12)


def test_the_page_has_all_counter_examples():
    assert len(LINES) == 6


def test_the_counter_example_on_the_gradient():
    text = PAGE.split("Thm D.1, case 3, on the gradient:")[1]
    p1, p2, p3, q1, q2, q3, alpha, beta, larger, before, after = numbers(text)[:11]
    p, q = [p1, p2, p3], [q1, q2, q3]

    def mean(b):
        error = [(x**alpha - y**alpha) / alpha for x, y in zip(p, q, strict=True)]
        w = [y**b * e for y, e in zip(q, error, strict=True)]
        sizes = [abs(x - y * sum(w)) for x, y in zip(w, q, strict=True)]
        return sum(s * mpmath.log(y) for s, y in zip(sizes, q, strict=True)) / sum(sizes)

    assert float(mean(beta)) == pytest.approx(before, abs=6e-3)
    assert float(mean(larger)) == pytest.approx(after, abs=6e-3)
    rows = two_of_three(p[:2], q[:2])
    verdict = confidence_focus(
        student=rows.student, teacher=rows.teacher, alpha=alpha, betas=(beta, larger), of="gradient"
    )
    assert verdict.counterexamples.all() and verdict.slack.item() == pytest.approx(float(mean(larger) - mean(beta)))


def test_premises_are_looked_at():
    rows = two_of_three([0.6, 0.2], [0.3, 0.3])
    assert theorem_3_2(1, rows, Constants(delta_1=0.25)).premises.all()
    assert not theorem_3_2(1, rows, Constants(delta_1=0.31)).premises.any()
    assert not theorem_3_2(1, rows, Constants(delta_1=0.15)).premises.any()
    assert not theorem_3_2(1, two_of_three([0.25, 0.1], [0.3, 0.3]), Constants(delta_1=0.2)).premises.any()
    assert not theorem_3_2(1, rows, Constants(delta_1=0.25, zeta=0.5)).premises.any()
    assert not any(theorem_3_2(case, rows).premises.any() for case in (2, 3, 4))
    assert theorem_d_1(1, rows).premises.all() and not theorem_d_1(2, rows).premises.any()
    zero = two_of_three([0.6, 0.0], [0.3, 0.3])
    assert not theorem_3_2(1, zero, Constants(delta_1=0.25)).premises.any()


def test_a_wrong_argument_is_named():
    rows = two_of_three([0.6, 0.2], [0.3, 0.3])
    with pytest.raises(InputError, match="case must be 1, 2, 3 or 4, got 5"):
        theorem_3_2(5, rows)
    with pytest.raises(InputError, match="case must be 1 or 2, got 3; the third one is confidence_focus"):
        theorem_d_1(3, rows)
    with pytest.raises(InputError, match=r"alphas must be two .* between 0 and 1, got \(1, 0\)"):
        theorem_f_3(1, rows, alphas=(1, 0))
