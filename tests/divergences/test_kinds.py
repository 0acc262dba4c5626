"""One contract over the whole table, and each kind against an independent implementation."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, jensenshannon
from scipy.special import rel_entr

from abkd import InputError
from abkd import divergences as d
from abkd.divergences import KINDS

KIND_NAMES = list(KINDS)
BOUNDED = {"jsd", "skewed_forward_kl", "skewed_reverse_kl", "total_variation"}


def rows(*shape, scale=1.0, dtype=torch.float64):
    return (scale * torch.randn(*shape, dtype=dtype)).log_softmax(-1)


def mp(row):
    return [mpmath.exp(mpmath.mpf(x)) for x in row]


def kl(a, b):
    return mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(a, b, strict=True))


def skewed(a, b, share):
    return kl(a, [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)])


def alpha_divergence(p, q, a):
    if a in (0, 1):
        return kl(p, q) if a == 1 else kl(q, p)
    return (mpmath.fsum(x**a * y ** (1 - a) for x, y in zip(p, q, strict=True)) - 1) / (a * (a - 1))


def alpha_beta(p, q, a, b):
    s = a + b
    return mpmath.fsum(-(x**a * y**b - a / s * x**s - b / s * y**s) / (a * b) for x, y in zip(p, q, strict=True))


def akl(p, q):
    order = sorted(range(len(p)), key=lambda k: -p[k])
    mass, head = mpmath.mpf(0), []
    for k in order:
        if mass >= 0.5:
            break
        head.append(k)
        mass += p[k]
    gaps = [abs(x - y) for x, y in zip(p, q, strict=True)]
    share = sum(gaps[k] for k in head) / sum(gaps)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def bdkd(p, q):
    def entropy(row):
        return -sum(x * mpmath.log(x) for x in row)

    forward, reverse = (2, 1) if entropy(p) > entropy(q) else (1, 2)
    return forward * kl(p, q) + reverse * kl(q, p)


def alpha_mixture(p, q):
    assistant = [mpmath.mpf("0.3") * x + mpmath.mpf("0.7") * y for x, y in zip(p, q, strict=True)]
    return alpha_beta(p, assistant, mpmath.mpf("0.2"), mpmath.mpf("0.7"))


def order_three_mixture(p, q):
    harmonic = [1 / (mpmath.mpf("0.3") / x + mpmath.mpf("0.7") / y) for x, y in zip(p, q, strict=True)]
    return kl(p, [x / sum(harmonic) for x in harmonic])


def geometric_mixture(p, q):
    geometric = [x ** mpmath.mpf("0.3") * y ** mpmath.mpf("0.7") for x, y in zip(p, q, strict=True)]
    return kl(p, [x / sum(geometric) for x in geometric])


ORACLES = [
    (d.AlphaBeta(0.2, 0.7), lambda p, q: alpha_beta(p, q, mpmath.mpf("0.2"), mpmath.mpf("0.7"))),
    (d.ForwardKL(), kl),
    (d.ReverseKL(), lambda p, q: kl(q, p)),
    (d.SymmetricKL(), lambda p, q: kl(p, q) + kl(q, p)),
    (d.JSD(), lambda p, q: (skewed(p, q, 0.5) + skewed(q, p, 0.5)) / 2),
    (d.JSD(0.25), lambda p, q: 0.25 * skewed(p, q, 0.25) + 0.75 * skewed(q, p, 0.75)),
    (d.SkewedForwardKL(0.125), lambda p, q: skewed(p, q, 0.125)),
    (d.SkewedReverseKL(0.875), lambda p, q: skewed(q, p, 0.125)),
    (d.TotalVariation(), lambda p, q: sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2),
    (d.WSD(0.25, 0.5), lambda p, q: 0.25 * kl(p, q) + 0.5 * kl(q, p)),
    (d.AKL(), akl),
    (d.BDKD(), bdkd),
    (d.AlphaNet(), lambda p, q: max(alpha_divergence(p, q, -1), kl(p, q))),
    (d.AlphaNet(0.0, 0.5), lambda p, q: max(kl(q, p), alpha_divergence(p, q, mpmath.mpf("0.5")))),
    (d.AlphaMixture(mix=0.3), alpha_mixture),
    (d.AlphaMixture(1.0, 0.0, mix=0.3, order=3.0), order_three_mixture),
    (d.AlphaMixture(1.0, 0.0, mix=0.3, order=1.0), geometric_mixture),
]
IDS = [str(divergence) for divergence, _ in ORACLES]


def test_every_kind_has_an_oracle_and_a_name():
    assert {divergence.kind for divergence, _ in ORACLES} == set(KINDS)
    assert all(kind.kind == name for name, kind in KINDS.items())


@pytest.mark.parametrize("divergence, oracle", ORACLES, ids=IDS)
@pytest.mark.parametrize("num_classes", [2, 10])
def test_value_in_fp64(divergence, oracle, num_classes):
    for _ in range(4):
        student, teacher = rows(num_classes), rows(num_classes, scale=2)
        with mpmath.workdps(50):
            truth = oracle(mp(teacher.tolist()), mp(student.tolist()))
        assert divergence(student=student, teacher=teacher).item() == pytest.approx(float(truth), rel=1e-10)


@pytest.mark.parametrize("divergence, oracle", ORACLES, ids=IDS)
@pytest.mark.parametrize("difference", [1e-4, 1e-2, 1.0, 8.0])
def test_value_in_fp32_by_the_rows_as_rounded(divergence, oracle, difference):
    logits = 2 * torch.randn(40)
    teacher = logits.log_softmax(-1)
    student = (logits + difference * torch.randn(40)).log_softmax(-1)
    inputs = {"student": student.double(), "teacher": teacher.double()}
    value = divergence(student=student, teacher=teacher)
    assert value.dtype == torch.float32
    if divergence.kind not in ("alpha_mixture",):  # its assistant is rounded once more
        assert value.item() == pytest.approx(divergence(**inputs).item(), rel=5e-6)
    else:
        assert value.item() == pytest.approx(divergence(**inputs).item(), rel=5e-6 + 1e-6 / difference)


@pytest.mark.parametrize("divergence, oracle", ORACLES, ids=IDS)
@pytest.mark.parametrize("difference", [1e-4, 1e-2, 1.0, 8.0])
def test_gradient_in_fp32_by_the_rows_as_rounded(divergence, oracle, difference):
    logits = 2 * torch.randn(40)
    teacher = logits.log_softmax(-1)
    student = (logits + difference * torch.randn(40)).log_softmax(-1)

    def gradients(dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (student, teacher)]
        value = divergence(student=inputs[0], teacher=inputs[1])
        return [gradient.double() for gradient in torch.autograd.grad(value, inputs)]

    tolerance = 1e-5
    if divergence.kind == "alpha_mixture":  # its assistant is rounded once more
        tolerance += 1e-6 / difference
    for ours, truth in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert (ours - truth).norm() <= tolerance * truth.norm()


def power_mixture(p, q, mix, k):
    powers = [mix * x**k + (1 - mix) * y**k for x, y in zip(p, q, strict=True)]
    total = sum(power ** (1 / k) for power in powers)
    return [power ** (1 / k) / total for power in powers]


@pytest.mark.parametrize("zero_in", ["student", "teacher", "both"])
def test_value_of_rows_with_zeros_where_it_is_finite(zero_in):
    """0 ln 0 = 0; one class at zero in one of the rows or in both."""
    logits = {"student": torch.randn(6, dtype=torch.float64), "teacher": torch.randn(6, dtype=torch.float64)}
    for name in ("student", "teacher"):
        if zero_in in (name, "both"):
            logits[name][2] = -math.inf
    inputs = {name: row.log_softmax(-1) for name, row in logits.items()}
    p, q = mp(inputs["teacher"].tolist()), mp(inputs["student"].tolist())

    def kl(a, b):
        return mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    def mixture(mix):
        return [mix * x + (1 - mix) * y for x, y in zip(p, q, strict=True)]

    third, half = mpmath.mpf(0.3), mpmath.mpf(0.5)
    expected = {
        d.JSD(0.3): third * kl(p, mixture(third)) + (1 - third) * kl(q, mixture(third)),
        d.SkewedForwardKL(0.3): kl(p, mixture(third)),
        d.SkewedReverseKL(0.3): kl(q, mixture(third)),
        d.TotalVariation(): sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
        d.AlphaBeta(0.5, 0.5): alpha_beta(p, q, half, half),
        d.AlphaMixture(0.5, 0.5, 0.3, -1.0): alpha_beta(p, power_mixture(p, q, third, 1), half, half),
        d.AlphaMixture(0.5, 0.5, 0.3, 0.0): alpha_beta(p, power_mixture(p, q, third, half), half, half),
    }
    if zero_in != "student":
        expected[d.ForwardKL()] = kl(p, q)
    if zero_in != "teacher":
        expected[d.ReverseKL()] = kl(q, p)
    for divergence, value in expected.items():
        assert divergence(**inputs).item() == pytest.approx(float(value), rel=1e-12), divergence


def test_kls_and_their_kin_equal_scipy_and_torch_distributions():
    student, teacher = rows(6, 11), rows(6, 11, scale=3)
    q, p = student.exp().numpy(), teacher.exp().numpy()
    forward, reverse = rel_entr(p, q).sum(-1), rel_entr(q, p).sum(-1)
    expected = {
        d.ForwardKL(): forward,
        d.ReverseKL(): reverse,
        d.SymmetricKL(): forward + reverse,
        d.WSD(0.3, 2.0): 0.3 * forward + 2.0 * reverse,
        d.JSD(): jensenshannon(p, q, axis=-1) ** 2,
        d.SkewedForwardKL(0.4): rel_entr(p, 0.4 * p + 0.6 * q).sum(-1),
        d.SkewedReverseKL(0.4): rel_entr(q, 0.4 * p + 0.6 * q).sum(-1),
        d.TotalVariation(): cdist(p, q, "cityblock").diagonal() / 2,
        d.PEARSON: ((p - q) ** 2 / q).sum(-1) / 2,
    }
    for divergence, value in expected.items():
        ours = divergence(student=student, teacher=teacher)
        torch.testing.assert_close(ours, torch.from_numpy(value), rtol=1e-10, atol=0)
    categorical = [torch.distributions.Categorical(logits=x) for x in (teacher, student)]
    torch.testing.assert_close(
        d.forward_kl(student=student, teacher=teacher), torch.distributions.kl_divergence(*categorical)
    )


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"akl"}))  # whose weights are constants to the gradient: below
def test_gradcheck_of_student_and_teacher(name):
    student, teacher = rows(3, 7).requires_grad_(), rows(3, 7).requires_grad_()
    divergence = KINDS[name]()
    assert torch.autograd.gradcheck(lambda q, p: divergence(student=q, teacher=p), (student, teacher))


@pytest.mark.parametrize("name", KIND_NAMES)
class TestContract:
    def test_zero_at_equal_rows_with_a_zero_gradient(self, name):
        logits = torch.randn(4, 9)
        student = logits.clone().requires_grad_()
        value = KINDS[name]()(student=student.log_softmax(-1), teacher=logits.log_softmax(-1))
        assert value.tolist() == [0.0] * 4
        value.sum().backward()
        assert student.grad.abs().max() == 0

    def test_never_negative_and_no_reduction(self, name):
        student, teacher = rows(2, 3, 5, scale=4), rows(2, 3, 5, scale=4)
        value = KINDS[name]()(student=student, teacher=teacher)
        assert value.shape == (2, 3)
        assert (value > 0).all()

    def test_permutation_of_classes_changes_nothing(self, name):
        student, teacher, order = rows(4, 9), rows(4, 9), torch.randperm(9)
        value = KINDS[name]()(student=student, teacher=teacher)
        permuted = KINDS[name]()(student=student[:, order], teacher=teacher[:, order])
        torch.testing.assert_close(value, permuted)

    def test_a_class_at_zero_in_both_adds_nothing(self, name):
        student, teacher = rows(4, 6).requires_grad_(), rows(4, 6)
        padding = torch.full((4, 2), -math.inf, dtype=torch.float64)
        value = KINDS[name]()(student=student, teacher=teacher)
        wide_student = torch.cat([student, padding], -1)
        padded = KINDS[name]()(student=wide_student, teacher=torch.cat([teacher, padding], -1))
        torch.testing.assert_close(value, padded)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        (padded_gradient,) = torch.autograd.grad(padded.sum(), student)
        torch.testing.assert_close(gradient, padded_gradient)

    @pytest.mark.parametrize("zero_in", ["student", "teacher", "one-hot teacher"])
    def test_a_class_at_zero_in_one_row_never_makes_nan(self, name, zero_in):
        inputs = {"student": torch.randn(3, 6, requires_grad=True), "teacher": torch.randn(3, 6, requires_grad=True)}
        mask = torch.zeros(6, dtype=torch.bool)
        mask[[1, 4]] = True
        where = zero_in.removeprefix("one-hot ")
        if where != zero_in:
            mask = torch.arange(6) != 2
        logits = inputs | {where: inputs[where].masked_fill(mask, -math.inf)}
        value = KINDS[name]()(**{key: x.log_softmax(-1) for key, x in logits.items()})
        assert not value.isnan().any()
        assert value.isfinite().all() or name not in BOUNDED
        gradients = torch.autograd.grad(value.sum(), list(inputs.values()))
        assert all(gradient.isfinite().all() for gradient in gradients)

    @pytest.mark.parametrize("size", [1e2, 1e4])
    def test_huge_logits_never_make_nan(self, name, size):
        inputs = [(size * torch.randn(3, 8)).requires_grad_() for _ in range(2)]
        student, teacher = (x.log_softmax(-1) for x in inputs)
        value = KINDS[name]()(student=student, teacher=teacher)
        assert not value.isnan().any()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value.sum(), inputs))

    def test_nan_is_not_hidden(self, name):
        student, teacher = rows(2, 5), rows(2, 5)
        student[0, 1] = math.nan
        value = KINDS[name]()(student=student, teacher=teacher)
        assert value.isnan().tolist() == [True, False]

    def test_a_large_vocabulary_agrees_with_fp64(self, name):
        for num_classes in (50_257, 151_936):
            student, teacher = rows(2, num_classes, dtype=torch.float32), rows(2, num_classes, dtype=torch.float32)
            value = KINDS[name]()(student=student, teacher=teacher)
            truth = KINDS[name]()(student=student.double(), teacher=teacher.double())
            torch.testing.assert_close(value.double(), truth, rtol=5e-6, atol=0)

    def test_bf16_rows_are_computed_in_fp32(self, name):
        student, teacher = rows(3, 8).bfloat16(), rows(3, 8).bfloat16()
        value = KINDS[name]()(student=student, teacher=teacher)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, KINDS[name]()(student=student.float(), teacher=teacher.float()))

    def test_rows_of_two_shapes_are_refused_and_not_broadcast(self, name):
        with pytest.raises(InputError, match=r"student \(3, 5\) and teacher \(1, 5\) must have one shape"):
            KINDS[name]()(student=rows(3, 5), teacher=rows(1, 5))

    def test_no_rows(self, name):
        student = torch.zeros(0, 5, requires_grad=True)
        value = KINDS[name]()(student=student.log_softmax(-1), teacher=torch.zeros(0, 5).log_softmax(-1))
        assert value.shape == (0,)
        value.sum().backward()

    def test_is_a_value_object(self, name):
        divergence = KINDS[name]()
        assert divergence == KINDS[name](**divergence.parameters)
        assert len({divergence, KINDS[name]()}) == 1
        assert repr(divergence).startswith(KINDS[name].__name__)


def test_akl_gradient_holds_its_weights_constant():
    student, teacher = rows(6, 9).requires_grad_(), rows(6, 9, scale=2)
    forward = d.forward_kl(student=student, teacher=teacher)
    reverse = d.reverse_kl(student=student, teacher=teacher)
    value = d.akl(student=student, teacher=teacher)
    share = ((value - reverse) / (forward - reverse)).detach()
    expected = torch.autograd.grad((share * forward + (1 - share) * reverse).sum(), student)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), student), expected)


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-6, 1 - 1e-6), st.integers(0, 2**31))
def test_skewed_kls_are_dual_and_bounded(mix, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (30 * torch.randn(2, 6, generator=generator, dtype=torch.float64)).log_softmax(-1)
    forward = d.skewed_forward_kl(student=student, teacher=teacher, mix=mix).item()
    reverse = d.skewed_reverse_kl(student=teacher, teacher=student, mix=1 - mix).item()
    assert forward == pytest.approx(reverse, rel=1e-9, abs=1e-300)
    assert 0 <= forward <= -math.log(mix) * (1 + 1e-9)
    assert d.jsd(student=student, teacher=teacher, mix=mix).item() <= math.log(2) * (1 + 1e-9)


@pytest.mark.parametrize("order", [-1.0, 0.0, 1.0, 3.0])
def test_alpha_mixture_of_disjoint_rows_is_not_nan(order):
    student = torch.tensor([[0.3, 1.0, -math.inf, -math.inf]]).log_softmax(-1).requires_grad_()
    teacher = torch.tensor([[-math.inf, -math.inf, 0.2, 2.0]]).log_softmax(-1).requires_grad_()
    value = d.alpha_mixture(student=student, teacher=teacher, order=order)
    assert not value.isnan().any()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value.sum(), (student, teacher)))


def test_named_points():
    student, teacher = rows(3, 5), rows(3, 5)
    p, q = teacher.exp(), student.exp()
    expected = {
        d.FORWARD_KL: (p * (p / q).log()).sum(-1),
        d.REVERSE_KL: (q * (q / p).log()).sum(-1),
        d.HELLINGER: 2 * (p.sqrt() - q.sqrt()).square().sum(-1),
        d.EUCLIDEAN: (p - q).square().sum(-1) / 2,
        d.ITAKURA_SAITO: (p / q - (p / q).log() - 1).sum(-1),
        d.LOG_EUCLIDEAN: (teacher - student).square().sum(-1) / 2,
        d.PEARSON: ((p - q).square() / q).sum(-1) / 2,
        d.NEYMAN: ((p - q).square() / p).sum(-1) / 2,
        d.alpha_divergence(0.5): 2 * (p.sqrt() - q.sqrt()).square().sum(-1),
        d.beta_divergence(1.0): (p - q).square().sum(-1) / 2,
    }
    for divergence, value in expected.items():
        torch.testing.assert_close(divergence(student=student, teacher=teacher), value)
    assert (d.AlphaBeta(0.2, 0.7), d.AlphaBeta(0.8, 0.3)) == (d.LLM, d.CIFAR)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: d.JSD(0.0), "mix must lie between 0 and 1, both excluded, got 0.0; .*forward_kl"),
        (lambda: d.SkewedForwardKL(0), "mix=0 is forward_kl"),
        (lambda: d.SkewedReverseKL(1.0), "mix=1 is reverse_kl"),
        (lambda: d.AlphaMixture(mix=0), "mix=0 is alpha_beta"),
        (lambda: d.AlphaMixture(order=math.inf), "order must be a finite number, got inf"),
        (lambda: d.WSD(0.0, 1.0), "forward_weight must be above 0, got 0.0; .*reverse_kl"),
        (lambda: d.AKL(1), "head_mass must lie between 0 and 1, both excluded, got 1"),
        (lambda: d.BDKD(1.0), "gain must be above 1, got 1.0; gain=1 is symmetric_kl"),
        (lambda: d.AlphaNet(1.0, 1.0), "alpha_low must be below alpha_high, got 1.0 and 1.0"),
        (lambda: d.AlphaBeta(math.nan), "alpha must be a finite number, got nan"),
        (lambda: d.jsd(student=rows(3), teacher=rows(3), mix=True), "mix must be a finite number, got True"),
        (lambda: d.Ramp(0.0, math.inf), "end must be a finite number, got inf"),
        (lambda: d.Ramp(0.0, 1.0, "cubic"), "shape must be one of constant, linear, cosine, got 'cubic'"),
    ],
)
def test_out_of_range_is_refused_with_the_way_out(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("points", [(0.3, 0.6), (0.0, 0.7), (0.5, -0.5), (0.0, 0.0), (1e-8, 0.5), (-0.7, 0.4)])
def test_gradcheck_of_alpha_and_beta(points):
    alpha, beta = (torch.full((3,), x, dtype=torch.float64, requires_grad=True) for x in points)
    student, teacher = rows(3, 6), rows(3, 6)
    assert torch.autograd.gradcheck(
        lambda a, b: d.alpha_beta(student=student, teacher=teacher, alpha=a, beta=b), (alpha, beta)
    )


def test_one_learned_alpha_for_all_rows_and_one_value_per_row():
    student, teacher = rows(2, 4, 6), rows(2, 4, 6)
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    beta = torch.linspace(-0.5, 0.9, 4, dtype=torch.float64)
    value = d.alpha_beta(student=student, teacher=teacher, alpha=alpha, beta=beta)
    for row in range(4):
        one = d.alpha_beta(student=student[:, row], teacher=teacher[:, row], alpha=0.3, beta=beta[row].item())
        torch.testing.assert_close(value[:, row], one)
    value.sum().backward()
    step = 1e-6
    up, down = (d.alpha_beta(student=student, teacher=teacher, alpha=0.3 + x, beta=beta).sum() for x in (step, -step))
    assert alpha.grad.item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-7)


def test_exponents_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"alpha of shape \(3,\) must broadcast to the rows \(2,\)"):
        d.alpha_beta(student=rows(2, 5), teacher=rows(2, 5), alpha=torch.zeros(3), beta=0.5)
    with pytest.raises(InputError, match="beta must hold finite numbers"):
        d.alpha_beta(student=rows(2, 5), teacher=rows(2, 5), alpha=0.2, beta=torch.tensor(math.inf))


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_schedule_begins_and_ends_where_it_says_and_crosses_the_limit_lines(shape):
    schedule = d.AlphaBetaSchedule(d.Ramp(0.8, -0.4, shape), 0.5)
    assert schedule.at(0.0) == d.AlphaBeta(0.8, 0.5)
    assert schedule.at(1.0) == d.AlphaBeta(-0.4, 0.5)
    assert schedule.at(0.5).alpha == pytest.approx(0.2)
    assert schedule.at(0.25).alpha == pytest.approx(0.5 if shape == "linear" else 0.2 + 0.6 * math.cos(math.pi / 4))
    student, teacher = rows(3, 6), rows(3, 6)
    values = [schedule.at(x / 12)(student=student, teacher=teacher) for x in range(13)]
    assert all(value.isfinite().all() for value in values)


def test_a_constant_ramp_stays():
    assert d.Ramp(0.3, 0.9, "constant").at(1.0) == 0.3
