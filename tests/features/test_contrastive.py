import math

import numpy as np
import pytest
import safetensors.torch
import torch

from abkd import ranks
from abkd.errors import InputError
from abkd.features import CRD
from abkd.features.contrastive import contrast

NUM_EXAMPLES, STUDENT, TEACHER = 12, 5, 7
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 4, 4, 1, 0])
SMALL = CRD(dim=6, num_negatives=8, seed=3)


def batch(n=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(n, STUDENT, generator=generator, dtype=dtype)
    teacher = torch.randn(n, TEACHER, generator=generator, dtype=dtype)
    return student, teacher, torch.randperm(NUM_EXAMPLES, generator=generator)[:n]


def build(method=SMALL, num_examples=NUM_EXAMPLES, labels=LABELS):
    return method.build(STUDENT, TEACHER, num_examples=num_examples, labels=labels).double()


class ByLoops:
    """The published algorithm for one example and one negative at a time, with probabilities as such."""

    def __init__(self, loss):
        self.loss, self.z = loss, None
        self.banks = [loss.student_bank.numpy().copy(), loss.teacher_bank.numpy().copy()]

    def embed(self, layer, feature):
        found = layer.weight.detach().numpy() @ feature.numpy() + layer.bias.detach().numpy()
        return found / math.sqrt(sum(x * x for x in found))

    def step(self, student, teacher, ids, all_ids, momentum=0.5, temperature=0.07):
        n, k = len(self.banks[0]), all_ids.shape[1] - 1
        embedded = [[self.embed(self.loss.embed_student, x) for x in student],
                    [self.embed(self.loss.embed_teacher, x) for x in teacher]]  # fmt: skip
        scores = [np.array([[math.exp(anchor @ bank[j] / temperature) for j in row]
                            for anchor, row in zip(anchors, all_ids.tolist(), strict=True)])
                  for anchors, bank in zip(embedded, self.banks[::-1], strict=True)]  # fmt: skip
        self.z = self.z or [score.mean() * n for score in scores]
        losses = []
        for i in range(len(ids)):
            total = 0.0
            for side in (0, 1):
                p = scores[side][i] / self.z[side]
                total -= math.log(p[0] / (p[0] + k / n))
                for negative in p[1:]:
                    total -= math.log((k / n) / (negative + k / n))
            losses.append(total)
        for bank, anchors in zip(self.banks, embedded, strict=True):
            for i, anchor in zip(ids.tolist(), anchors, strict=True):
                bank[i] = momentum * bank[i] + (1 - momentum) * anchor
                bank[i] /= math.sqrt((bank[i] ** 2).sum())
        return losses


@pytest.mark.parametrize("method", [SMALL, CRD(dim=6, num_negatives=8, seed=3, negatives="all")])
def test_equals_the_published_algorithm_in_loops(method):
    loss = build(method)
    slow = ByLoops(loss)
    for step in range(4):
        student, teacher, ids = batch(seed=step)
        all_ids = torch.cat([ids[:, None], loss._negatives(ids, step)], dim=1)
        expected = slow.step(student, teacher, ids, all_ids)
        np.testing.assert_allclose(loss(student, teacher, ids).detach(), expected, rtol=1e-10)
        np.testing.assert_allclose(loss.student_bank, slow.banks[0], rtol=1e-10)
        np.testing.assert_allclose(loss.teacher_bank, slow.banks[1], rtol=1e-10)
        np.testing.assert_allclose(loss.log_z.exp(), slow.z, rtol=1e-10)
    assert loss.num_batches == 4


def test_gradients():
    loss = build()
    student, teacher, ids = batch()
    loss(student, teacher, ids)
    loss.eval()  # so that it remembers nothing between the calls
    student.requires_grad_()
    weight = loss.embed_teacher.weight
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, ids), (student,))

    def of_weight(w):
        return torch.func.functional_call(loss, {"embed_teacher.weight": w}, (student, teacher, ids))

    assert torch.autograd.gradcheck(of_weight, (weight,))


def test_nothing_flows_into_the_teacher_and_the_banks():
    loss = build()
    student, teacher, ids = batch()
    student.requires_grad_()
    teacher.requires_grad_()
    loss(student, teacher, ids).sum().backward()  # after the banks have moved
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())
    assert not loss.student_bank.requires_grad and loss.student_bank.grad_fn is None


def test_contrast_is_the_published_formula_and_stays_finite():
    scores = torch.randn(5, 9, dtype=torch.float64)
    p, noise = scores.exp().numpy(), 0.3
    h = p / (p + noise)
    expected = -np.log(h[:, 0]) - np.log(1 - h[:, 1:]).sum(1)
    np.testing.assert_allclose(contrast(scores, math.log(noise)), expected, rtol=1e-12)
    for size in (1e3, 1e5):
        extreme = (size * torch.randn(5, 9)).requires_grad_()
        value = contrast(extreme, math.log(noise))
        assert value.isfinite().all() and torch.autograd.grad(value.sum(), extreme)[0].isfinite().all()


def test_negatives_of_all_are_uniform_too():
    loss = build(CRD(num_negatives=40_000, negatives="all"), labels=None)
    drawn = loss._negatives(torch.arange(2), 0)
    counts = drawn.flatten().bincount(minlength=NUM_EXAMPLES).double()
    assert (counts - 80_000 / NUM_EXAMPLES).abs().max() < 5 * math.sqrt(80_000 / NUM_EXAMPLES)
    assert not torch.equal(drawn, loss._negatives(torch.arange(2), 1))


def test_a_resumed_training_equals_an_uninterrupted_one():
    whole, start = build(), build()
    expected = [whole(*batch(seed=step)) for step in range(4)]
    for step in range(2):
        start(*batch(seed=step))
    saved = safetensors.torch.save(start.state_dict())
    resumed = build(CRD(dim=6, num_negatives=8, seed=3))
    torch.rand(5)
    resumed.load_state_dict(safetensors.torch.load(saved))
    found = [resumed(*batch(seed=step)) for step in (2, 3)]
    assert torch.equal(torch.stack(found), torch.stack(expected[2:]))
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True)
    )


def test_the_seed_decides_and_the_global_state_stays():
    before = torch.get_rng_state()
    first, second, other = build(), build(), build(CRD(dim=6, num_negatives=8, seed=4))
    values = [loss(*batch()) for loss in (first, second, other)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    assert not torch.equal(first.embed_student.weight, other.embed_student.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_remembered_in_evaluation_mode():
    loss = build().eval()
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    values = [loss(*batch()) for _ in range(2)]
    assert torch.equal(*values) and values[0].isfinite().all()
    assert all(torch.equal(value, state[name]) for name, value in loss.state_dict().items())


def test_an_example_that_comes_twice_enters_with_its_mean():
    loss = build()
    student, teacher, _ = batch(3)
    ids = torch.tensor([5, 2, 5])
    embedded = torch.nn.functional.normalize(loss.embed_student(student))
    expected = loss.student_bank[5] / 2 + (embedded[0] + embedded[2]) / 4
    loss(student, teacher, ids)
    torch.testing.assert_close(loss.student_bank[5], (expected / expected.norm()).detach())


def test_ranks_hold_the_same_banks_and_constants(monkeypatch):
    """Two ranks of two examples each, played one after the other: what a rank gathers is what both would give."""
    batches = [batch(2, seed=rank) for rank in (0, 1)]
    batches[1][2][:] = torch.tensor([i for i in range(NUM_EXAMPLES) if i not in batches[0][2].tolist()][:2])
    given: list[list] = [[], []]

    def play(rank, gather):
        loss = build()
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        monkeypatch.setattr(ranks, "num_ranks", lambda: 2)
        monkeypatch.setattr(ranks, "gather", gather)
        return loss, loss(*batches[rank])

    for rank in (0, 1):
        play(rank, lambda value, rank=rank: given[rank].append(value) or [value, value])
    losses = []
    for rank in (0, 1):
        calls = iter(zip(*given, strict=True))
        losses.append(play(rank, lambda value, calls=calls: list(next(calls))))
    (first, _), (second, _) = losses
    for name in ("student_bank", "teacher_bank", "log_z"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    for student, _, ids in batches:
        near = (first.student_bank[ids] * torch.nn.functional.normalize(first.embed_student(student))).sum(-1)
        assert (near > 0.5).all()  # each rank's examples have entered
    mean = torch.stack([gathered[0] for gathered in given]).exp().mean(0)
    torch.testing.assert_close(first.log_z.exp(), NUM_EXAMPLES * mean)
    assert not torch.equal(first._negatives(torch.arange(2), 1), second_negatives(second, monkeypatch))


def second_negatives(loss, monkeypatch):
    monkeypatch.setattr(ranks, "rank", lambda: 0)
    return loss._negatives(torch.arange(2), 1)


@pytest.mark.parametrize("n", [0, 1])
def test_small_batches(n):
    loss = build()
    student, teacher, ids = batch(n)
    student.requires_grad_()
    value = loss(student, teacher, ids)
    assert value.shape == (n,) and value.isfinite().all()
    gradients = torch.autograd.grad(value.sum(), [student, *loss.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert loss.num_batches == n


def test_zeros_and_identical_features_are_no_nan():
    student, teacher, ids = batch()
    for zeroed in (student, teacher):
        zeroed[1:3] = 0.0
    for bias in (True, False):
        loss = build()
        if not bias:  # then the embedding of zeros is zeros
            torch.nn.init.zeros_(loss.embed_student.bias)
            torch.nn.init.zeros_(loss.embed_teacher.bias)
        x = student.clone().requires_grad_()
        value = loss(x, teacher, ids)
        gradients = torch.autograd.grad(value.sum(), [x, *loss.parameters()])
        assert value.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
        assert loss.student_bank.isfinite().all()
    loss = SMALL.build(STUDENT, STUDENT, num_examples=NUM_EXAMPLES, labels=LABELS).double()
    loss.embed_teacher.load_state_dict(loss.embed_student.state_dict())
    x = student.clone().requires_grad_()
    for _ in range(3):
        value = loss(x, x.detach(), ids)
        assert value.isfinite().all() and torch.autograd.grad(value.sum(), x)[0].isfinite().all()


def test_nan_is_not_hidden():
    student, teacher, ids = batch()
    student[2, 1] = math.nan
    loss = build()
    loss(*batch(seed=1))
    value = loss(student, teacher, ids)
    assert value[2].isnan() and value[[0, 1, 3]].isfinite().all()


def test_the_features_are_taken_in_fp32_under_autocast():
    student, teacher, ids = batch(dtype=torch.bfloat16)
    first, second = (build().float() for _ in range(2))
    expected = first(student.float(), teacher.float(), ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = second(student, teacher, ids)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_the_banks_start_at_length_one_on_average():
    loss = CRD(negatives="all").build(STUDENT, TEACHER, num_examples=400)
    lengths = loss.teacher_bank.norm(dim=1)
    assert loss.teacher_bank.shape == (400, 128) and lengths.mean().item() == pytest.approx(1, abs=0.01)
    assert loss.embed_student.weight.dtype == torch.float32


def test_it_learns_to_tell_examples_apart():
    loss = CRD(dim=8, num_negatives=16, negatives="all").build(STUDENT, TEACHER, num_examples=NUM_EXAMPLES)
    student, teacher = torch.randn(NUM_EXAMPLES, STUDENT), torch.randn(NUM_EXAMPLES, TEACHER)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.05, momentum=0.9)
    values = []
    for _ in range(60):
        value = loss(student, teacher, torch.arange(NUM_EXAMPLES)).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dim": 0}, "dim must be a whole number above 0, got 0"),
        ({"num_negatives": 1.5}, "num_negatives must be a whole number above 0, got 1.5"),
        ({"temperature": 0.0}, "temperature must lie between 1e-3 and 1e3, got 0.0"),
        ({"momentum": 1.0}, "momentum must lie between 0 and 1, 1 excluded, got 1.0"),
        ({"negatives": "none"}, "negatives must be other_classes or all, got 'none'"),
    ],
)
def test_out_of_range_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        CRD(**options)


@pytest.mark.parametrize("ids", [[0, 1, 2, 12], [-1, 1, 2, 3]])
def test_ids_out_of_range_are_refused_before_anything_moves(ids):
    loss = build()
    student, teacher, _ = batch()
    with pytest.raises(InputError, match=f"example_ids must lie between 0 and 11, got {min(ids)} to {max(ids)}"):
        loss(student, teacher, torch.tensor(ids))
    assert loss.num_batches == 0
