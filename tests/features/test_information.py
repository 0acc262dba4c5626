import math

import numpy as np
import pytest
import torch

from abkd.errors import InputError
from abkd.features import ITRD
from abkd.features.information import correlation_loss, mutual_loss, purity


def features(n=6, student=4, teacher=4, dtype=torch.float64):
    return torch.randn(n, student, dtype=dtype), torch.randn(n, teacher, dtype=dtype)


def correlation_by_loops(student, teacher, order):
    n, dim = student.shape
    total = 0.0
    for i in range(dim):
        a, b = ((x[:, i] - x[:, i].mean()) / x[:, i].std(ddof=1) for x in (student, teacher))
        c = sum(a[k] * b[k] for k in range(n)) / n
        total += abs(c - 1) ** (2 * order)
    return math.log2(total)


def gram_by_loops(x):
    n = len(x)
    return np.array([[x[i] @ x[j] / (math.dist(x[i], 0 * x[i]) * math.dist(x[j], 0 * x[j])) for j in range(n)]
                     for i in range(n)])  # fmt: skip


def renyi_2_bits(gram):
    """The order-2 entropy of the eigenvalues of a matrix of trace 1."""
    eigenvalues = np.linalg.eigvalsh(gram / np.trace(gram))
    return -math.log2((eigenvalues**2).sum())


@pytest.mark.parametrize("order", [1.01, 1.5, 0.3])
@pytest.mark.parametrize("n", [2, 7, 64])
def test_correlation_equals_loops(order, n):
    student, teacher = features(n)
    found = correlation_loss(student, teacher, order).item()
    assert found == pytest.approx(correlation_by_loops(student.numpy(), teacher.numpy(), order), rel=1e-12)


@pytest.mark.parametrize("n, student, teacher", [(2, 4, 4), (6, 3, 5), (9, 20, 2)])
def test_mutual_equals_loops_and_entropies_of_eigenvalues(n, student, teacher):
    student, teacher = features(n, student, teacher)
    own, other = gram_by_loops(student.numpy()), gram_by_loops(teacher.numpy())
    joint = own * other
    norms = [(k**2).sum() / np.trace(k) ** 2 for k in (own, joint)]
    assert mutual_loss(student, teacher).item() == pytest.approx(norms[0] - norms[1], rel=1e-10)
    information = renyi_2_bits(own) + renyi_2_bits(other) - renyi_2_bits(joint)
    found = mutual_loss(student, teacher, "bits").item()
    assert found == pytest.approx(renyi_2_bits(other) - information, rel=1e-9)


@pytest.mark.parametrize("which", ["purity", "bits", "correlation"])
def test_gradients(which):
    student, teacher = features()
    student.requires_grad_()
    loss = {
        "correlation": lambda x: correlation_loss(x, teacher, 1.5),
        "purity": lambda x: mutual_loss(x, teacher),
        "bits": lambda x: mutual_loss(x, teacher, "bits"),
    }[which]
    assert torch.autograd.gradcheck(loss, (student,))


def test_bounds_of_the_correlation():
    student, _ = features(8, 5)
    assert correlation_loss(student, student, 1.5).item() == pytest.approx(math.log2(5) - 3 * 3)
    assert correlation_loss(student, 3 * student + 1, 1.01).item() == pytest.approx(math.log2(5) - 2.02 * 3)
    opposed = correlation_loss(student, -student, 1.5).item()
    assert opposed == pytest.approx(math.log2(5 * (2 - 1 / 8) ** 3)) and opposed < math.log2(5) + 3


def test_identical_features_keep_finite_gradients():
    for dtype in (torch.float32, torch.float64):
        student, _ = features(8, 5, dtype=dtype)
        student.requires_grad_()
        value = correlation_loss(student, student.detach(), 1.5) + mutual_loss(student, student.detach(), "bits")
        gradient = torch.autograd.grad(value, student)[0]
        assert value.isfinite() and gradient.isfinite().all()
    assert torch.autograd.grad(correlation_loss(student, student.detach(), 1.5), student)[0].abs().max() < 1e-12


def test_purity_runs_from_one_over_n_to_one():
    assert purity(torch.eye(8)).item() == 1 / 8
    assert purity(torch.ones(8, 8)).item() == 1
    assert purity(7 * torch.ones(8, 8)).item() == pytest.approx(1)
    assert purity(torch.zeros(8, 8)).item() == 1


@pytest.mark.parametrize("student_dim", [4, 3])
@pytest.mark.parametrize("method", [ITRD(), ITRD(mutual_in="bits"), ITRD(corr_weight=0.0), ITRD(mutual_weight=0.0)])
class TestEdges:
    def call(self, method, student, teacher):
        loss = method.build(student.shape[1], 4, num_examples=9).double()
        student.requires_grad_()
        value = loss(student, teacher, torch.arange(len(student)))
        gradients = torch.autograd.grad(value.sum(), [student, *loss.parameters()])
        assert value.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
        return value

    def test_a_batch_of_one_says_nothing(self, method, student_dim):
        value = self.call(method, *features(1, student_dim))
        assert value.item() == pytest.approx(method.corr_weight * 2)  # log2 of 4 channels

    def test_zeros_are_no_nan(self, method, student_dim):
        for zeroed in ((0,), (1,), (0, 1)):
            for rows in (slice(None), slice(2, 4)):
                pair = features(6, student_dim)
                for which in zeroed:
                    pair[which][rows] = 0.0
                self.call(method, *pair)

    def test_a_constant_channel_and_identical_examples(self, method, student_dim):
        student, teacher = features(6, student_dim)
        student[:, 1], teacher[:, 2] = 0.1, 0.1
        self.call(method, student, teacher)
        student, teacher = features(1, student_dim)
        self.call(method, student.repeat(6, 1), teacher.repeat(6, 1))

    def test_no_example(self, method, student_dim):
        assert self.call(method, *features(0, student_dim)).shape == (0,)

    def test_tiny_and_huge_features(self, method, student_dim):
        for scale in (1e-30, 1e30):
            student, teacher = features(6, student_dim)
            self.call(method, scale * student, teacher / scale)

    def test_nan_is_not_hidden(self, method, student_dim):
        student, teacher = features(6, student_dim)
        student[2, 1] = math.nan
        loss = method.build(student_dim, 4, num_examples=9).double()
        assert loss(student, teacher, torch.arange(6)).isnan().all()


def test_the_loss_is_the_weighted_sum_and_the_same_for_each_example():
    ids = torch.arange(6)
    for student_dim in (4, 3):
        student, teacher = features(6, student_dim)
        loss = ITRD(corr_weight=0.7, mutual_weight=3.0, order=1.01).build(student_dim, 4, num_examples=6).double()
        embedded = loss.embed(student)
        same = student if student_dim == 4 else embedded
        expected = 0.7 * correlation_loss(embedded, teacher, 1.01) + 3 * mutual_loss(same, teacher)
        torch.testing.assert_close(loss(student, teacher, ids), expected.expand(6))


def test_zeros_of_the_mutual_loss_get_no_gradient_and_leave_the_others_alone():
    student, teacher = features(6)
    student[2:4] = 0.0
    student.requires_grad_()
    value = mutual_loss(student, teacher)
    gradient = torch.autograd.grad(value, student)[0]
    assert gradient[2:4].abs().max() == 0 and gradient[:2].abs().min() > 0
    there = [0, 1, 4, 5]
    torch.testing.assert_close(value, mutual_loss(student[there], teacher[there]))


def test_the_features_are_taken_in_fp32_under_autocast():
    student, teacher = features(6, dtype=torch.float32)
    loss = ITRD().build(4, 4, num_examples=6)
    expected = loss(student.bfloat16(), teacher.bfloat16(), torch.arange(6))
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(student.bfloat16(), teacher.bfloat16(), torch.arange(6))
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_methods_are_value_objects():
    assert ITRD() == ITRD() and len({ITRD(), ITRD(), ITRD(order=1.01)}) == 2
    assert (ITRD().corr_weight, ITRD().mutual_weight, ITRD().order) == (2.0, 1.0, 1.5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"corr_weight": -1.0}, "corr_weight must be >= 0, got -1.0"),
        ({"corr_weight": 0, "mutual_weight": 0}, "corr_weight and mutual_weight are both 0"),
        ({"order": 0.0}, "order must be above 0, and at most 100, got 0.0"),
        ({"order": math.nan}, "order must be a finite number, got nan"),
        ({"mutual_in": "nats"}, "mutual_in must be purity or bits, got 'nats'"),
    ],
)
def test_out_of_range_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        ITRD(**options)


@pytest.mark.parametrize(
    "student, teacher, ids, message",
    [
        (torch.ones(2, 3), torch.ones(2, 4), torch.arange(2), r"student_feature must be \[2, 4\], got \[2, 3\]"),
        (torch.ones(2, 4), torch.ones(1, 4), torch.arange(2), r"teacher_feature must be \[2, 4\], got \[1, 4\]"),
        (torch.ones(2, 4), torch.ones(2, 4), torch.tensor([0, 9]), "example_ids must lie between 0 and 8, got 0 to 9"),
        (torch.ones(2, 4), torch.ones(2, 4), torch.tensor([-1, 3]), "must lie between 0 and 8, got -1 to 3"),
        (torch.ones(2, 4), torch.ones(2, 4), torch.ones(2), r"example_ids must be int64 \[batch\], got torch.float32"),
    ],
)
def test_mistaken_inputs_are_refused(student, teacher, ids, message):
    with pytest.raises(InputError, match=message):
        ITRD().build(4, 4, num_examples=9)(student, teacher, ids)
