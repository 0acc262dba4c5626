"""One contract over the table of calibrations, and each against its published formula written with numpy or scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from scipy.stats import pearsonr

from abkd import InputError
from abkd.calibrations import CALIBRATIONS, DIST, DKD, LSD, MLKD, TTM, WTTM, Plain, correlation_distance, standardize
from abkd.divergences import JSD, KINDS, AlphaBeta, ForwardKL, ReverseKL

PER_SAMPLE = {"plain", "dkd", "lsd", "ttm", "wttm"}
AB = AlphaBeta(0.8, 0.3)


def batch(n=5, classes=7, scale=2.0, dtype=torch.float64):
    student, teacher = (scale * torch.randn(n, classes, dtype=dtype) for _ in range(2))
    return {"student_logits": student, "teacher_logits": teacher, "labels": torch.randint(classes, (n,))}


def alpha_beta(p, q, alpha, beta):
    s = alpha + beta
    return -(p**alpha * q**beta - alpha / s * p**s - beta / s * q**s).sum(-1) / (alpha * beta)


def kl(p, q):
    return rel_entr(p, q).sum(-1)


INSIDE = {
    ForwardKL(): kl,
    ReverseKL(): lambda p, q: kl(q, p),
    AB: lambda p, q: alpha_beta(p, q, 0.8, 0.3),
    AlphaBeta(1.2, -0.1): lambda p, q: alpha_beta(p, q, 1.2, -0.1),
    JSD(): lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
}


def plain(student, teacher, labels, compare):
    return 16 * compare(softmax(teacher / 4, -1), softmax(student / 4, -1))


def dkd(student, teacher, labels, compare):
    result = []
    for z_q, z_p, label in zip(student, teacher, labels, strict=True):
        q, p = softmax(z_q / 4), softmax(z_p / 4)
        others = np.arange(len(q)) != label
        target = kl(np.array([p[label], 1 - p[label]]), np.array([q[label], 1 - q[label]]))
        result.append(16 * (target + 8 * compare(p[others] / p[others].sum(), q[others] / q[others].sum())))
    return np.array(result)


def lsd(student, teacher, labels, compare):
    student, teacher = ((z - z.mean(-1, keepdims=True)) / z.std(-1, keepdims=True) for z in (student, teacher))
    return 4 * compare(softmax(teacher / 2, -1), softmax(student / 2, -1))


def ttm(student, teacher, labels, compare):
    power = softmax(teacher, -1) ** 0.1
    return compare(power / power.sum(-1, keepdims=True), softmax(student, -1))


def wttm(student, teacher, labels, compare):
    return (softmax(teacher, -1) ** 0.1).sum(-1) * ttm(student, teacher, labels, compare)


def mlkd(student, teacher, labels, compare):
    n, classes = student.shape
    total = np.zeros(n)
    for temperature in (2, 3, 4, 5, 6):
        q, p = softmax(student / temperature, -1), softmax(teacher / temperature, -1)
        total += temperature**2 * compare(p, q)
        total += sum((q[i] @ q[j] - p[i] @ p[j]) ** 2 for i in range(n) for j in range(n)) / n
        pairs = ((i, j) for i in range(classes) for j in range(classes))
        total += sum((q[:, i] @ q[:, j] - p[:, i] @ p[:, j]) ** 2 for i, j in pairs) / classes
    return total


ORACLES = {
    "plain": (lambda inside: Plain(inside, 4.0, temperature_gradient_scale="squared"), plain),
    "dkd": (DKD, dkd),
    "lsd": (LSD, lsd),
    "ttm": (TTM, ttm),
    "wttm": (WTTM, wttm),
    "mlkd": (MLKD, mlkd),
}


def test_every_calibration_has_an_oracle():
    assert set(CALIBRATIONS) == {*ORACLES, "dist"}


@pytest.mark.parametrize("inside", INSIDE, ids=str)
@pytest.mark.parametrize("kind", ORACLES)
def test_equals_the_published_formula(kind, inside):
    make, oracle = ORACLES[kind]
    inputs = batch()
    expected = oracle(*(x.numpy() for x in inputs.values()), INSIDE[inside])
    np.testing.assert_allclose(make(inside)(**inputs).numpy(), expected, rtol=1e-9)


def test_dist_equals_one_minus_the_correlations():
    inputs = batch()
    q, p = (softmax(inputs[name].numpy() / 4, -1) for name in ("student_logits", "teacher_logits"))
    between = np.array([1 - pearsonr(x, y)[0] for x, y in zip(q, p, strict=True)])
    over = np.mean([1 - pearsonr(x, y)[0] for x, y in zip(q.T, p.T, strict=True)])
    np.testing.assert_allclose(DIST()(**inputs), 16 * (between + over), rtol=1e-9)
    unscaled = DIST(2.0, 0.5, temperature_gradient_scale="none")(**inputs)
    np.testing.assert_allclose(unscaled, 2 * between + 0.5 * over, rtol=1e-9)


def test_dkd_and_the_teachers_mass_off_the_target_make_kd():
    """Zhao et al., Eq. 5: KL = target part + (1 - p_target) * non-target part."""
    inputs = batch()
    options = {"temperature": 3.0, "temperature_gradient_scale": "none"}
    target = DKD(target_weight=1.0, nontarget_weight=0.0, **options)(**inputs)
    others = DKD(target_weight=0.0, nontarget_weight=1.0, **options)(**inputs)
    p = (inputs["teacher_logits"] / 3).softmax(-1).gather(-1, inputs["labels"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(target + (1 - p) * others, Plain(ForwardKL(), 3.0)(**inputs))


def test_the_target_part_of_dkd_stays_a_forward_kl():
    inputs = batch()
    assert torch.equal(DKD(AB, nontarget_weight=0.0)(**inputs), DKD(nontarget_weight=0.0)(**inputs))
    assert not torch.allclose(DKD(AB)(**inputs), DKD()(**inputs))


def test_dkd_of_two_classes_is_the_target_part():
    inputs = batch(classes=2)
    assert torch.equal(DKD(AB)(**inputs), DKD(nontarget_weight=0.0)(**inputs))
    torch.testing.assert_close(DKD()(**inputs), Plain(ForwardKL(), 4.0, temperature_gradient_scale="squared")(**inputs))


def test_ttm_is_a_teacher_temperature():
    inputs = batch()
    torch.testing.assert_close(TTM(AB, 0.25)(**inputs), Plain(AB, 1.0, teacher_temperature=4.0)(**inputs))


def test_lsd_sees_neither_shift_nor_scale():
    inputs = batch()
    moved = inputs | {"student_logits": 7 * inputs["student_logits"] - 3}
    torch.testing.assert_close(LSD(AB)(**moved), LSD(AB)(**inputs))


def test_each_side_has_its_temperature():
    inputs = batch()
    q, p = softmax(inputs["student_logits"].numpy() / 2, -1), softmax(inputs["teacher_logits"].numpy() / 3, -1)
    np.testing.assert_allclose(Plain(ForwardKL(), 2.0, 3.0)(**inputs), kl(p, q))


@pytest.mark.parametrize("inside", KINDS)
@pytest.mark.parametrize("kind", sorted(set(CALIBRATIONS) - {"dist"}))
def test_takes_every_divergence_of_the_table(kind, inside):
    inputs = batch()
    inputs["student_logits"].requires_grad_()
    value = CALIBRATIONS[kind](KINDS[inside]())(**inputs)
    assert value.shape == (5,) and (value > 0).all()
    assert torch.autograd.grad(value.sum(), inputs["student_logits"])[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", KINDS)
def test_half_logits_of_every_divergence_are_fp32_arithmetic_on_the_rounded_logits(inside, dtype):
    student, teacher = (3 * torch.randn(2, 4, 60)).to(dtype)

    def value_and_gradient(student, teacher):
        student = student.clone().requires_grad_()
        value = Plain(KINDS[inside]())(student_logits=student, teacher_logits=teacher)
        return value, *torch.autograd.grad(value.sum(), student)

    value, gradient = value_and_gradient(student, teacher)
    full_value, full_gradient = value_and_gradient(student.float(), teacher.float())
    assert torch.equal(value, full_value)
    assert gradient.dtype == dtype and torch.equal(gradient, full_gradient.to(dtype))


@pytest.mark.parametrize("kind", CALIBRATIONS)
class TestContract:
    def test_gradcheck(self, kind):
        inputs = batch(3, 4)
        logits = [inputs.pop(name).requires_grad_() for name in ("student_logits", "teacher_logits")]
        calibration = CALIBRATIONS[kind]()

        def value(student, teacher):
            return calibration(student_logits=student, teacher_logits=teacher, **inputs)

        if kind == "wttm":  # its weight is a constant to the gradient
            logits[1].requires_grad_(False)
        assert torch.autograd.gradcheck(value, logits)

    def test_zero_with_zero_gradient_at_equal_logits(self, kind):
        if kind in ("ttm", "wttm"):
            pytest.skip("a transformed teacher is not the student")
        inputs = batch()
        inputs["teacher_logits"] = inputs["student_logits"].clone()
        inputs["student_logits"].requires_grad_()
        value = CALIBRATIONS[kind]()(**inputs)
        assert value.tolist() == [0.0] * 5
        assert torch.autograd.grad(value.sum(), inputs["student_logits"])[0].abs().max() < 1e-15

    def test_samples_in_another_order_give_the_same(self, kind):
        inputs, order = batch(), torch.tensor([3, 0, 4, 1, 2])
        value = CALIBRATIONS[kind]()(**inputs)
        torch.testing.assert_close(CALIBRATIONS[kind]()(**{k: x[order] for k, x in inputs.items()}), value[order])

    def test_samples_do_not_see_each_other(self, kind):
        inputs = batch()
        alone = CALIBRATIONS[kind]()(**{k: x[:1] for k, x in inputs.items()})
        together = CALIBRATIONS[kind]()(**inputs)[:1]
        assert torch.allclose(alone, together) == (kind in PER_SAMPLE)

    def test_classes_at_minus_infinity_in_both_add_nothing(self, kind):
        if kind == "dist":
            pytest.skip("a class of probability 0 is a class of its correlations")
        inputs = batch()
        padded = {k: torch.nn.functional.pad(x, (0, 3), value=-math.inf) for k, x in inputs.items() if k != "labels"}
        if kind == "mlkd":  # its class term is a mean over the classes
            padded["student_logits"].requires_grad_()
            value = CALIBRATIONS[kind]()(**padded, labels=None)
            assert torch.autograd.grad(value.sum(), padded["student_logits"])[0][:, 7:].abs().max() == 0
            return
        torch.testing.assert_close(
            CALIBRATIONS[kind]()(**padded, labels=inputs["labels"]), CALIBRATIONS[kind]()(**inputs)
        )

    @pytest.mark.parametrize("size", [1e2, 1e4])
    def test_huge_logits_never_make_nan(self, kind, size):
        inputs = batch(scale=size, dtype=torch.float32)
        inputs["student_logits"].requires_grad_()
        value = CALIBRATIONS[kind]()(**inputs)
        assert not value.isnan().any()
        assert torch.autograd.grad(value.sum(), inputs["student_logits"])[0].isfinite().all()

    def test_constant_rows_and_batches_of_one_never_make_nan(self, kind):
        for inputs in (batch(1), batch()):
            for constant in (0.0, 0.1):
                inputs["student_logits"] = torch.full_like(inputs["student_logits"], constant, requires_grad=True)
                value = CALIBRATIONS[kind]()(**inputs)
                assert value.isfinite().all()
                assert torch.autograd.grad(value.sum(), inputs["student_logits"])[0].isfinite().all()

    @pytest.mark.parametrize(
        "zero_in", [("student_logits",), ("teacher_logits",), ("student_logits", "teacher_logits")]
    )
    @pytest.mark.parametrize("zeros", ["the label", "all but the label", "two others"])
    def test_a_class_at_zero_never_makes_nan(self, kind, zeros, zero_in):
        inputs = batch() | {"labels": torch.zeros(5, dtype=torch.long)}
        logits = [inputs[name].requires_grad_() for name in ("student_logits", "teacher_logits")]
        columns = {"the label": [0], "all but the label": [1, 2, 3, 4, 5, 6], "two others": [2, 5]}[zeros]
        for name in zero_in:
            inputs[name] = inputs[name].index_fill(-1, torch.tensor(columns), -math.inf)
        value = CALIBRATIONS[kind]()(**inputs)
        assert not value.isnan().any()
        gradients = torch.autograd.grad(value.sum(), logits, allow_unused=True)
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)

    def test_half_logits_are_computed_in_fp32(self, kind):
        inputs = {k: x if k == "labels" else x.bfloat16() for k, x in batch().items()}
        value = CALIBRATIONS[kind]()(**inputs)
        assert value.dtype == torch.float32
        assert torch.equal(
            value, CALIBRATIONS[kind]()(**{k: x if k == "labels" else x.float() for k, x in inputs.items()})
        )

    def test_nan_is_not_hidden(self, kind):
        inputs = batch()
        inputs["student_logits"][2, 3] = math.nan
        assert CALIBRATIONS[kind]()(**inputs)[2].isnan()

    def test_no_sample(self, kind):
        inputs = batch(0)
        inputs["student_logits"].requires_grad_()
        value = CALIBRATIONS[kind]()(**inputs)
        assert value.shape == (0,)
        value.sum().backward()

    def test_shapes_are_not_broadcast(self, kind):
        inputs = batch() | {"teacher_logits": torch.randn(1, 7)}
        with pytest.raises(InputError, match=r"\(5, 7\) and teacher_logits \(1, 7\) must have one shape"):
            CALIBRATIONS[kind]()(**inputs)

    def test_is_a_value_object(self, kind):
        assert CALIBRATIONS[kind]() == CALIBRATIONS[kind]()
        assert len({CALIBRATIONS[kind](), CALIBRATIONS[kind]()}) == 1
        assert repr(CALIBRATIONS[kind]()).startswith(CALIBRATIONS[kind].__name__)
        assert CALIBRATIONS[kind]().at(0.5) == CALIBRATIONS[kind]()


@pytest.mark.parametrize(
    "labels, message",
    [
        (None, r"labels must be \[N\] with N=5, got None"),
        (torch.zeros(4, dtype=torch.long), r"labels must be \[N\] with N=5, got \(4,\)"),
        (torch.tensor([0, 1, 2, 3, 7]), "labels must lie between 0 and 6, got 0 to 7"),
        (torch.tensor([0, 1, 2, 3, -100]), "labels must lie between 0 and 6, got -100 to 3"),
        (torch.tensor([0, 1, 2, 3, -1]), "labels must lie between 0 and 6, got -1 to 3"),
        (torch.zeros(5), "labels must be int64, got torch.float32"),
    ],
)
def test_mistaken_labels_are_refused(labels, message):
    with pytest.raises(InputError, match=message):
        DKD()(**(batch() | {"labels": labels}))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Plain(temperature=0.0), "temperature must be above 0, between 1e-6 and 1e6, got 0.0"),
        (lambda: Plain(temperature=math.inf), "temperature must be a finite number, got inf"),
        (
            lambda: Plain(teacher_temperature=-1.0),
            "teacher_temperature must be above 0, between 1e-6 and 1e6, got -1.0",
        ),
        (lambda: Plain(temperature_gradient_scale="cubed"), "temperature_gradient_scale must be none or squared"),
        (
            lambda: Plain(AB, 2.0, 3.0, "squared"),
            "temperature_gradient_scale=squared needs one temperature, got 2.0 and teacher_temperature=3.0",
        ),
        (lambda: DKD(4.0), r"divergence must be one of abkd.divergences, as in ForwardKL\(\), got 4.0"),
        (lambda: Plain(ForwardKL), "divergence must be one of abkd.divergences"),
        (lambda: Plain(temperature=1e200), "temperature must be above 0, between 1e-6 and 1e6, got 1e"),
        (lambda: Plain(temperature=10**400), "temperature must be a finite number"),
        (lambda: MLKD(temperatures=None), "temperatures must be a list of at least one number above 0, got None"),
        (lambda: DKD(target_weight=-1.0), "target_weight must be >= 0, got -1.0"),
        (lambda: DKD(target_weight=0, nontarget_weight=0), "target_weight and nontarget_weight are both 0"),
        (lambda: DIST(inter_weight=math.nan), "inter_weight must be a finite number, got nan"),
        (lambda: TTM(exponent=0.0), "exponent must be above 0, between 1e-6 and 1e6, got 0.0"),
        (lambda: MLKD(temperatures=()), r"temperatures must be a list of at least one number above 0, got \(\)"),
        (lambda: MLKD(temperatures=[1.0, 0.0]), "temperatures must be above 0, between 1e-6 and 1e6, got 0.0"),
    ],
)
def test_out_of_range_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_parameters_other_than_the_defaults_reach_the_formula():
    inputs = batch()
    student, teacher = (inputs[name].numpy() for name in ("student_logits", "teacher_logits"))
    labels = inputs["labels"].numpy()
    rows = [(softmax(q / 3), softmax(p / 3), label) for q, p, label in zip(student, teacher, labels, strict=True)]
    target = [kl(np.array([p[k], 1 - p[k]]), np.array([q[k], 1 - q[k]])) for q, p, k in rows]
    options = {"temperature": 3.0, "temperature_gradient_scale": "none"}
    np.testing.assert_allclose(
        DKD(target_weight=2.5, nontarget_weight=0.0, **options)(**inputs), 2.5 * np.array(target)
    )
    q, p = ((z - z.mean(-1, keepdims=True)) / z.std(-1, keepdims=True) for z in (student, teacher))
    np.testing.assert_allclose(LSD(temperature=3.0)(**inputs), 9 * kl(softmax(p / 3, -1), softmax(q / 3, -1)))
    power = softmax(teacher, -1) ** 0.4
    expected = power.sum(-1) * kl(power / power.sum(-1, keepdims=True), softmax(student, -1))
    np.testing.assert_allclose(WTTM(exponent=0.4)(**inputs), expected)
    q, p = (softmax(z / 3, -1) for z in (student, teacher))
    between = [9 * (1 - pearsonr(x, y)[0]) for x, y in zip(q, p, strict=True)]
    np.testing.assert_allclose(DIST(1.0, 0.0, temperature=3.0)(**inputs), between, rtol=1e-9)
    gram = ((q @ q.T - p @ p.T) ** 2).sum() / 5 + ((q.T @ q - p.T @ p) ** 2).sum() / 7
    np.testing.assert_allclose(MLKD(temperatures=[3.0])(**inputs), 9 * kl(p, q) + gram, rtol=1e-9)


@pytest.mark.parametrize("kind", CALIBRATIONS)
def test_a_teacher_of_more_digits_keeps_them(kind):
    inputs = batch()
    mixed = inputs | {"student_logits": inputs["student_logits"].float()}
    assert CALIBRATIONS[kind]()(**mixed).dtype == torch.float64


@pytest.mark.parametrize("scale", [30.0, 46.0, 60.0, 100.0, 300.0, 1000.0])
def test_probabilities_whose_squares_underflow_make_no_nan(scale):
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    student[:, 5] -= scale
    teacher[:, 5] -= scale
    for kind in (DIST(temperature=1.0), DIST(), MLKD(), LSD()):
        for factor in (1.0, scale):
            logits = (factor * student).requires_grad_()
            value = kind(student_logits=logits, teacher_logits=factor * teacher)
            assert value.isfinite().all()
            assert torch.autograd.grad(value.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("factor", [1e19, 1e-20, 1e-24])
def test_lsd_sees_no_scale_however_large_or_small(factor):
    inputs = {name: x.float() if x.is_floating_point() else x for name, x in batch().items()}
    moved = inputs | {"student_logits": (factor * inputs["student_logits"]).requires_grad_()}
    value = LSD(AB)(**moved)
    torch.testing.assert_close(value, LSD(AB)(**inputs), rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(value.sum(), moved["student_logits"])[0].isfinite().all()


def test_mlkd_makes_no_matrix_of_the_classes():
    logits = torch.randn(2, 2, 200_000)
    assert MLKD()(student_logits=logits[0], teacher_logits=logits[1]).isfinite().all()  # 160 GB if it did


def test_the_squared_scale_is_a_factor():
    inputs = batch()
    for kind in (Plain, DKD, LSD):
        scaled, unscaled = (kind(AB, temperature=3.0, temperature_gradient_scale=s) for s in ("squared", "none"))
        torch.testing.assert_close(scaled(**inputs), 9 * unscaled(**inputs))


def test_standardize_leaves_absent_classes_out():
    row = torch.tensor([[1.0, -math.inf, 3.0, 8.0]], dtype=torch.float64)
    found = standardize(row)
    assert found[0, 1] == -math.inf
    torch.testing.assert_close(found[:, [0, 2, 3]], standardize(row[:, [0, 2, 3]]))
    assert standardize(torch.full((1, 3), 0.1)).tolist() == [[0.0] * 3]


def test_correlation_distance_keeps_its_digits_near_one():
    row = torch.linspace(0, 1, 9, dtype=torch.float64)
    bump = torch.cos(3 * row)
    distances = [correlation_distance(row, row + step * bump).item() for step in (1e-6, 1e-3)]
    assert distances[0] == pytest.approx(distances[1] * 1e-6, rel=1e-2)
    assert correlation_distance(row, 3 * row + 1).item() < 1e-30
    assert correlation_distance(row, -row).item() == pytest.approx(2)
    assert correlation_distance(row, torch.full_like(row, 0.1)).item() == 1
