"""The heart: values and gradients against the five branches of the definition in 100-digit arithmetic."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abkd import InputError
from abkd.divergences import KINDS, AlphaBeta, ForwardKL, ReverseKL, alpha_beta, forward_kl, reverse_kl

POINTS = [
    (0.2, 0.7), (1, 0), (0, 1), (0, 0), (0.5, 0.5), (0.5, -0.5), (-0.5, 0.5), (0.8, 0.3), (1, 1),
    (1e-9, 0.7), (0.7, 1e-9), (1e-3, 0.7), (2, -1), (-1, 2), (1, -1), (-0.3, -0.4), (1e-9, -1e-9), (0.4, -0.4 + 1e-9),
]  # fmt: skip
LIMITS = [(0, 0.7), (0.7, 0), (0.5, -0.5), (-0.5, 0.5), (0, 0), (1, 0), (0, 1)]


def oracle(student, teacher, alpha, beta, digits=100):
    """Wang et al., Def. 4.1 and App. B, its five branches as printed, on lists of logarithms."""
    with mpmath.workdps(digits):
        a, b = mpmath.mpf(alpha), mpmath.mpf(beta)
        total = mpmath.mpf(0)
        for log_q, log_p in zip(student, teacher, strict=True):
            p, q = mpmath.exp(mpmath.mpf(log_p)), mpmath.exp(mpmath.mpf(log_q))
            if a == 0 and b == 0:
                total += (mpmath.log(p) - mpmath.log(q)) ** 2 / 2
            elif b == 0:
                total += (p**a * (mpmath.log(p**a) - mpmath.log(q**a)) - p**a + q**a) / a**2
            elif a == 0:
                total += (q**b * (mpmath.log(q**b) - mpmath.log(p**b)) - q**b + p**b) / b**2
            elif a + b == 0:
                total += (mpmath.log(q**a / p**a) + (q**a / p**a) ** -1 - 1) / a**2
            else:
                s = a + b
                total += -(p**a * q**b - a / s * p**s - b / s * q**s) / (a * b)
        return total


def oracle_gradient(student, teacher, alpha, beta):
    """dD/dz of the student's logits: q_y sum_k w_k - w_y, w = q^beta (p^alpha - q^alpha)/alpha; 50 digits."""
    with mpmath.workdps(50):
        a, b = mpmath.mpf(alpha), mpmath.mpf(beta)
        q = [mpmath.exp(mpmath.mpf(x)) for x in student]
        p = [mpmath.exp(mpmath.mpf(x)) for x in teacher]
        error = [mpmath.log(y / x) if a == 0 else (y**a - x**a) / a for x, y in zip(q, p, strict=True)]
        w = [x**b * e for x, e in zip(q, error, strict=True)]
        return [x * sum(w) - y for x, y in zip(q, w, strict=True)]


def log_softmax(*shape, scale=1.0, dtype=torch.float64):
    return (scale * torch.randn(*shape, dtype=dtype)).log_softmax(-1)


def relative_error(ours, truth):
    return float(abs(mpmath.mpf(ours) - truth) / abs(truth))


@pytest.mark.parametrize("difference", [1e-4, 1e-2, 1.0, 8.0])
@pytest.mark.parametrize("alpha, beta", POINTS)
def test_value_equals_the_definition_in_fp32(alpha, beta, difference):
    logits = 2 * torch.randn(40)
    teacher = logits.log_softmax(-1)
    student = (logits + difference * torch.randn(40)).log_softmax(-1)
    truth = oracle(student.tolist(), teacher.tolist(), alpha, beta)
    value = alpha_beta(student=student, teacher=teacher, alpha=alpha, beta=beta)
    assert value.dtype == torch.float32
    assert relative_error(value.item(), truth) < 5e-6


@pytest.mark.parametrize("alpha, beta", POINTS)
def test_value_equals_the_definition_in_fp64(alpha, beta):
    student, teacher = log_softmax(30), log_softmax(30, scale=2)
    truth = oracle(student.tolist(), teacher.tolist(), alpha, beta)
    value = alpha_beta(student=student, teacher=teacher, alpha=alpha, beta=beta).item()
    assert relative_error(value, truth) < 1e-13


@pytest.mark.parametrize("difference", [1e-4, 1e-2, 1.0, 8.0])
@pytest.mark.parametrize("alpha, beta", POINTS)
def test_logit_gradient_equals_the_closed_form_in_fp32(alpha, beta, difference):
    logits = 2 * torch.randn(40)
    teacher = logits.log_softmax(-1)
    student_logits = (logits + difference * torch.randn(40)).requires_grad_()
    student = student_logits.log_softmax(-1)
    truth = oracle_gradient(student.tolist(), teacher.tolist(), alpha, beta)
    alpha_beta(student=student, teacher=teacher, alpha=alpha, beta=beta).backward()
    truth = torch.tensor([float(x) for x in truth], dtype=torch.float64)
    # log-probabilities carry a rounding of 2^-24 times their size, which is 1e-3 of a difference of 1e-4
    tolerance = 1e-5 + 3e-7 / difference
    assert (student_logits.grad - truth).norm() < tolerance * truth.norm()


@pytest.mark.parametrize("alpha, beta", POINTS)
def test_gradcheck_of_student_and_teacher(alpha, beta):
    student = log_softmax(3, 7).requires_grad_()
    teacher = log_softmax(3, 7).requires_grad_()
    divergence = AlphaBeta(alpha, beta)
    assert torch.autograd.gradcheck(lambda q, p: divergence(student=q, teacher=p), (student, teacher))


def test_only_what_needs_a_gradient_gets_one():
    student, teacher = log_softmax(2, 5).requires_grad_(), log_softmax(2, 5)
    alpha_beta(student=student, teacher=teacher, alpha=0.2, beta=0.7).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_named_points_equal_independent_implementations():
    student, teacher = log_softmax(4, 9), log_softmax(4, 9)
    q, p = (torch.distributions.Categorical(logits=x) for x in (student, teacher))
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(forward_kl(student=student, teacher=teacher), kl(p, q))
    torch.testing.assert_close(reverse_kl(student=student, teacher=teacher), kl(q, p))
    hellinger = 2 * (p.probs.sqrt() - q.probs.sqrt()).square().sum(-1)
    torch.testing.assert_close(alpha_beta(student=student, teacher=teacher, alpha=0.5, beta=0.5), hellinger)
    euclid = (p.probs - q.probs).square().sum(-1) / 2
    torch.testing.assert_close(alpha_beta(student=student, teacher=teacher, alpha=1, beta=1), euclid)
    pearson = ((p.probs - q.probs).square() / q.probs).sum(-1) / 2
    torch.testing.assert_close(alpha_beta(student=student, teacher=teacher, alpha=2, beta=-1), pearson)
    log_euclid = (student - teacher).square().sum(-1) / 2
    torch.testing.assert_close(alpha_beta(student=student, teacher=teacher, alpha=0, beta=0), log_euclid)


exponents = st.one_of(
    st.floats(-2, 2).filter(lambda x: x == 0 or abs(x) > 1e-12),
    st.sampled_from([0.0, 1e-8, -1e-8, 1e-5, 0.5, 1.0, -1.0]),
)


@settings(max_examples=150, deadline=None)
@given(exponents, exponents, st.integers(0, 2**31))
def test_identities_hold_anywhere_on_the_plane(alpha, beta, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)

    def divergence(q, p, a, b):
        return alpha_beta(student=q, teacher=p, alpha=a, beta=b).item()

    value = divergence(student, teacher, alpha, beta)
    close = {"rel": 1e-10, "abs": 1e-13}
    assert value >= 0
    assert relative_error(value, oracle(student.tolist(), teacher.tolist(), alpha, beta)) < 1e-10
    assert divergence(teacher, teacher, alpha, beta) == 0
    assert divergence(teacher, student, beta, alpha) == pytest.approx(value, **close)  # duality
    shift = math.log(3.0)
    assert divergence(student + shift, teacher + shift, alpha, beta) == pytest.approx(
        3 ** (alpha + beta) * value, **close
    )
    assert divergence(-student, -teacher, -alpha, -beta) == pytest.approx(value, **close)  # inversion
    assert divergence(2 * student, 2 * teacher, alpha, beta) / 4 == pytest.approx(  # zoom
        divergence(student, teacher, 2 * alpha, 2 * beta), **close
    )
    order = torch.randperm(6, generator=generator)
    assert divergence(student[order], teacher[order], alpha, beta) == pytest.approx(value, **close)


def oracle_slopes(student, teacher, alpha, beta):
    """dD/dalpha and dD/dbeta by central differences of 300-digit arithmetic, which the limit lines do not disturb."""
    with mpmath.workdps(300):
        a, b, step = mpmath.mpf(alpha), mpmath.mpf(beta), mpmath.mpf("1e-40")

        def value(x, y):
            return oracle(student, teacher, x, y, digits=300)

        in_alpha = (value(a + step, b) - value(a - step, b)) / (2 * step)
        return in_alpha, (value(a, b + step) - value(a, b - step)) / (2 * step)


@settings(max_examples=60, deadline=None)
@given(exponents, exponents, st.sampled_from([0.0, 1e-8, -1e-8, None]), st.integers(0, 2**31))
def test_slopes_in_alpha_and_beta_anywhere_and_beside_the_limit_lines(alpha, beta, sum_, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(2, 5, generator=generator, dtype=torch.float64)).log_softmax(-1)
    beta = beta if sum_ is None else sum_ - alpha
    exponents = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (alpha, beta)]
    alpha_beta(student=student, teacher=teacher, alpha=exponents[0], beta=exponents[1]).backward()
    truth = oracle_slopes(student.tolist(), teacher.tolist(), alpha, beta)
    for exponent, slope in zip(exponents, truth, strict=True):
        assert exponent.grad.item() == pytest.approx(float(slope), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("step", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("alpha, beta", LIMITS)
def test_continuous_across_the_limit_lines(alpha, beta, step):
    student, teacher = log_softmax(20), log_softmax(20)

    def value_and_gradient(a, b):
        logits = student.clone().requires_grad_()
        value = alpha_beta(student=logits.log_softmax(-1), teacher=teacher, alpha=a, beta=b)
        value.backward()
        return torch.cat([value.detach().view(1), logits.grad])

    here = value_and_gradient(alpha, beta)
    for a, b in ((step, 0), (-step, 0), (0, step), (0, -step), (step, -step)):
        there = value_and_gradient(alpha + a, beta + b)
        assert (there - here).norm() < 30 * step * here.norm()


@pytest.mark.parametrize("vocab", [1, 2, 10, 50_257, 151_936])
def test_shapes_and_any_vocabulary(vocab):
    student, teacher = log_softmax(2, 3, vocab, dtype=torch.float32), log_softmax(2, 3, vocab, dtype=torch.float32)
    student.requires_grad_()
    value = alpha_beta(student=student, teacher=teacher, alpha=0.2, beta=0.7)
    assert value.shape == (2, 3)
    value.sum().backward()
    assert student.grad.shape == student.shape
    truth = alpha_beta(student=student.detach().double(), teacher=teacher.double(), alpha=0.2, beta=0.7)
    torch.testing.assert_close(value.detach().double(), truth, rtol=1e-5, atol=1e-7)


def test_one_row_no_row_and_a_view_that_is_not_contiguous():
    student, teacher = log_softmax(5), log_softmax(5)
    assert alpha_beta(student=student, teacher=teacher, alpha=0.2, beta=0.7).shape == ()
    empty = torch.zeros(0, 5, requires_grad=True)
    value = alpha_beta(student=empty, teacher=torch.zeros(0, 5), alpha=0.2, beta=0.7)
    assert value.shape == (0,)
    value.sum().backward()
    assert empty.grad.shape == (0, 5)
    wide_student, wide_teacher = torch.randn(5, 4).double().T, torch.randn(5, 4).double().T
    strided = forward_kl(student=wide_student, teacher=wide_teacher)
    torch.testing.assert_close(
        strided, forward_kl(student=wide_student.contiguous(), teacher=wide_teacher.contiguous())
    )


def with_minus_infinity(log_probs, *columns):
    changed = log_probs.clone()
    changed[..., list(columns)] = -math.inf
    return changed.log_softmax(-1)


@pytest.mark.parametrize("alpha, beta", POINTS)
def test_a_class_forbidden_in_both_rows_adds_exactly_nothing(alpha, beta):
    student, teacher = log_softmax(3, 8), log_softmax(3, 8)
    padded_student = with_minus_infinity(student, 2, 7).requires_grad_()
    padded_teacher = with_minus_infinity(teacher, 2, 7)
    kept = [0, 1, 3, 4, 5, 6]
    short_student = padded_student.detach()[:, kept].requires_grad_()
    for q, p in ((padded_student, padded_teacher), (short_student, padded_teacher[:, kept])):
        alpha_beta(student=q, teacher=p, alpha=alpha, beta=beta).sum().backward()
    value = alpha_beta(student=padded_student, teacher=padded_teacher, alpha=alpha, beta=beta)
    truth = alpha_beta(student=short_student, teacher=padded_teacher[:, kept], alpha=alpha, beta=beta)
    torch.testing.assert_close(value, truth, rtol=1e-12, atol=0)
    assert torch.equal(padded_student.grad[:, kept], short_student.grad)
    assert torch.equal(padded_student.grad[:, [2, 7]], torch.zeros(3, 2).double())


FAR, FARTHER = -1e20, -1e30  # logarithms so low that their class is at the limit, even to an exponent of 1e-9


@pytest.mark.parametrize("zero_in", ["student", "teacher"])
@pytest.mark.parametrize("alpha, beta", [*POINTS, (0.3, -0.1), (-0.1, 0.3), (-0.5, 0.2), (0.2, -0.5)])
def test_a_class_at_zero_in_one_row_gives_the_limit(alpha, beta, zero_in):
    """Compared with the definition in the far where it converges, +inf where it grows on."""
    rows = {"student": torch.tensor([-1.0, -0.5, -2.0]).double(), "teacher": torch.tensor([-0.7, -1.0, -1.5]).double()}
    rows[zero_in][1] = -math.inf
    student, teacher = rows["student"].requires_grad_(), rows["teacher"].requires_grad_()
    value = alpha_beta(student=student, teacher=teacher, alpha=alpha, beta=beta)
    far, farther = (
        oracle(*(torch.where(row.isneginf(), limit, row.detach()).tolist() for row in (student, teacher)), alpha, beta)
        for limit in (FAR, FARTHER)
    )
    if farther < 1.01 * far:
        assert relative_error(value.item(), farther) < 1e-12
    else:
        assert value.item() == math.inf
    value.backward()
    assert not student.grad.isnan().any() and not student.grad.isinf().any()
    assert not teacher.grad.isnan().any() and not teacher.grad.isinf().any()


def oracle_weight(log_q, log_p, alpha, beta):
    """w = q^beta (p^alpha - q^alpha) / alpha, 100 digits."""
    with mpmath.workdps(100):
        a, b, x, y = (mpmath.mpf(value) for value in (alpha, beta, log_q, log_p))
        return mpmath.exp(b * x) * (y - x if a == 0 else (mpmath.exp(a * y) - mpmath.exp(a * x)) / a)


@pytest.mark.parametrize("zero_in", ["student", "teacher"])
@pytest.mark.parametrize(
    "alpha, beta", [*POINTS, (0.4, 0), (2, 0), (0, 0.4), (-2, 2), (2, -2), (0.3, -0.1), (-0.1, 0.3)]
)
def test_the_gradient_of_a_class_at_zero_is_its_finite_limit_or_nothing(alpha, beta, zero_in):
    rows = {"student": torch.tensor([-1.3]).double(), "teacher": torch.tensor([-0.7]).double()}
    inputs = {
        key: torch.where(torch.tensor(key == zero_in), -math.inf, row).requires_grad_() for key, row in rows.items()
    }
    alpha_beta(**inputs, alpha=alpha, beta=beta).backward()
    limits = [{key: limit if key == zero_in else row.item() for key, row in rows.items()} for limit in (FAR, FARTHER)]
    student = [oracle_weight(at["student"], at["teacher"], alpha, beta) for at in limits]
    teacher = [oracle_weight(at["teacher"], at["student"], beta, alpha) for at in limits]  # duality
    for row, (far, farther) in ((inputs["student"], student), (inputs["teacher"], teacher)):
        expected = -float(farther) if abs(farther) <= 1.01 * abs(far) else 0.0
        assert row.grad.item() == pytest.approx(expected, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("zero_in", ["student", "teacher"])
@pytest.mark.parametrize("alpha, beta", [(0.2, 0.7), (0.5, 0.5), (0.8, 0.3), (1.0, 1.0), (1.4, 0.2)])
def test_slopes_in_alpha_and_beta_of_a_class_at_zero(alpha, beta, zero_in):
    rows = {"student": torch.tensor([-1.3]).double(), "teacher": torch.tensor([-0.7]).double()}
    inputs = {key: row - (math.inf if key == zero_in else 0.0) for key, row in rows.items()}
    exponents = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (alpha, beta)]
    alpha_beta(**inputs, alpha=exponents[0], beta=exponents[1]).backward()
    far = {key: [FAR] if key == zero_in else row.tolist() for key, row in rows.items()}
    truth = oracle_slopes(far["student"], far["teacher"], alpha, beta)
    assert [exponent.grad.item() for exponent in exponents] == pytest.approx([float(x) for x in truth], rel=1e-12)


def test_infinite_forward_kl_still_has_its_logit_gradient():
    """At q = 0 < p, KL(p || q) is infinite and its gradient on the logits is q - p all the same."""
    teacher = torch.tensor([0.2, 0.5, 0.3]).double().log()
    logits = torch.tensor([0.3, -math.inf, 0.1]).double().requires_grad_()
    student = logits.log_softmax(-1)
    value = forward_kl(student=student, teacher=teacher)
    value.backward()
    assert value.item() == math.inf
    expected = student.detach().exp() - teacher.exp()
    torch.testing.assert_close(logits.grad[[0, 2]], expected[[0, 2]])


def test_a_one_hot_teacher_makes_forward_kl_the_cross_entropy():
    teacher = torch.full((2, 4), -math.inf).double()
    teacher[[0, 1], [1, 3]] = 0.0
    logits = torch.randn(2, 4).double().requires_grad_()
    value = forward_kl(student=logits.log_softmax(-1), teacher=teacher)
    truth = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 3]), reduction="none")
    torch.testing.assert_close(value, truth)
    gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (value, truth)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("alpha, beta", [(0.2, 0.7), (1, 0), (0, 1), (0.5, 0.5), (0.8, 0.3), (0, 0)])
def test_logits_of_ten_thousand_give_the_right_finite_value(alpha, beta):
    logits = torch.tensor([[1e4, 0.0, -1e4, 3.0], [-1e4, 1e4, 1.0, -2.0]])
    student_logits, teacher = logits.clone().requires_grad_(), logits[:, [2, 0, 1, 3]].log_softmax(-1)
    student = student_logits.log_softmax(-1)
    value = alpha_beta(student=student, teacher=teacher, alpha=alpha, beta=beta)
    for row in range(2):
        truth = oracle(student[row].tolist(), teacher[row].tolist(), alpha, beta)
        assert relative_error(value[row].item(), truth) < 5e-6
    value.sum().backward()
    assert student_logits.grad.isfinite().all()


def test_nan_is_not_hidden():
    student = torch.tensor([[0.0, math.nan], [math.log(0.5), math.log(0.5)]])
    value = forward_kl(student=student, teacher=torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log())
    assert value[0].isnan() and value[1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_fp32(dtype):
    student, teacher = (log_softmax(5, 50, dtype=torch.float32).to(dtype) for _ in range(2))
    half = student.clone().requires_grad_()
    value = alpha_beta(student=half, teacher=teacher, alpha=0.2, beta=0.7)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, alpha_beta(student=student.float(), teacher=teacher.float(), alpha=0.2, beta=0.7))
    value.sum().backward()
    assert half.grad.dtype == dtype


@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "0.2", None, True])
def test_an_exponent_that_is_no_finite_number_is_refused(name, value):
    row = log_softmax(3)
    with pytest.raises(InputError, match=f"{name} must be a finite number, got {value!r}"):
        alpha_beta(student=row, teacher=row, **({"alpha": 0.5, "beta": 0.5} | {name: value}))


def test_shapes_that_differ_are_refused():
    with pytest.raises(InputError, match=r"student \(2, 3\) and teacher \(3,\)"):
        forward_kl(student=torch.zeros(2, 3), teacher=torch.zeros(3))


def test_arguments_cannot_be_swapped_by_position():
    with pytest.raises(TypeError):
        forward_kl(log_softmax(3), log_softmax(3))


@pytest.mark.parametrize("kind", KINDS)
def test_contract_of_every_kind(kind):
    divergence = KINDS[kind]()
    student, teacher = log_softmax(2, 3, 7), log_softmax(2, 3, 7)
    value = divergence(student=student, teacher=teacher)
    assert value.shape == (2, 3) and (value > 0).all()
    assert torch.equal(divergence(student=teacher, teacher=teacher), torch.zeros(2, 3).double())
    assert divergence == KINDS[kind]() and hash(divergence) == hash(KINDS[kind]())
    assert repr(divergence).startswith(KINDS[kind].__name__)


def test_classes_are_their_functions():
    student, teacher = log_softmax(4, 7), log_softmax(4, 7)
    rows = {"student": student, "teacher": teacher}
    assert torch.equal(AlphaBeta(0.3, 0.6)(**rows), alpha_beta(**rows, alpha=0.3, beta=0.6))
    assert torch.equal(ForwardKL()(**rows), forward_kl(**rows))
    assert torch.equal(ReverseKL()(**rows), reverse_kl(**rows))
    assert not torch.allclose(forward_kl(**rows), reverse_kl(**rows))
