"""TopKTargets: what they hold, what they refuse, the rows they stand for, and samples."""

import math
from dataclasses import replace

import pytest
import torch

from abkd import InputError
from abkd import divergences as d
from abkd.divergences import KINDS
from abkd.divergences.top_k import degree
from abkd.targets import DenseTargets, TopKTargets

VOCAB, K = 31, 6
DIVERGENCES = [*(kind() for kind in KINDS.values()), d.EUCLIDEAN, d.HELLINGER, d.LOG_EUCLIDEAN, d.AlphaBeta(0.4, -0.4)]


def logits(num_rows=5, scale=2.0, dtype=torch.float64, vocab=VOCAB):
    return scale * torch.randn(num_rows, vocab, dtype=dtype)


def row_by_hand(teacher, k, each):
    """The k likeliest classes as they are, `each` (a function of the rest's mass and classes) elsewhere; plain."""
    rows = torch.zeros_like(teacher)
    for row, p in zip(rows, teacher.softmax(-1), strict=True):
        top = p.argsort(descending=True)[:k]
        row.fill_(each(1 - p[top].sum(), len(p) - k))
        row[top] = p[top]
    return (rows / rows.sum(-1, keepdim=True)).log()


EVENLY = {"uniform": lambda mass, count: mass / count, "renormalise": lambda mass, count: 0.0}


def value_and_gradient(function, student):
    student = student.clone().requires_grad_()
    value = function(student)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


@pytest.mark.parametrize("tail", EVENLY)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_uniform_and_renormalise_are_the_divergence_from_that_row(divergence, tail):
    student, teacher = logits(), logits()
    targets = TopKTargets.of_logits(teacher, K, tail=tail)
    row = row_by_hand(teacher, K, EVENLY[tail])
    truth = value_and_gradient(lambda z: divergence(student=z.log_softmax(-1), teacher=row), student)
    for ours, true in zip(value_and_gradient(lambda z: targets.compare(z, divergence), student), truth, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-11)


def test_the_kept_classes_need_not_be_the_likeliest():
    teacher = logits(1)
    log_p = teacher.log_softmax(-1)
    ids = teacher.argsort(-1)[:, :3]  # below the mean of the rest
    rest = log_p.scatter(-1, ids, -math.inf).logsumexp(-1)
    targets = TopKTargets(ids, log_p.gather(-1, ids), rest, VOCAB, "uniform")
    expected = (rest - math.log(VOCAB - 3)).expand(1, VOCAB).scatter(-1, ids, log_p.gather(-1, ids))
    torch.testing.assert_close(targets.logits(0, 1), expected)


@pytest.mark.parametrize("tail", ["lump", "uniform", "renormalise", "sampled"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_all_classes_kept_is_dense(divergence, tail):
    student, teacher = logits(), logits()
    targets = TopKTargets.of_logits(teacher, VOCAB, tail="lump")
    assert targets.tail_log_mass.isneginf().all()
    targets = replace(targets, tail=tail, log_weights=torch.zeros_like(teacher) if tail == "sampled" else None)
    if tail == "sampled" and degree(divergence) is None:
        with pytest.raises(InputError, match=f"{divergence.kind} is no sum over classes; use tail=lump or"):
            targets.compare(student, divergence)
        return
    truth = value_and_gradient(
        lambda z: divergence(student=z.log_softmax(-1), teacher=teacher.log_softmax(-1)), student
    )
    for ours, true in zip(value_and_gradient(lambda z: targets.compare(z, divergence), student), truth, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tail", ["lump", "uniform", "renormalise", "sampled"])
def test_an_optimal_student_has_value_and_gradient_0_or_a_bias_that_is_known(tail):
    """At q = p: lump and samples of p - q are 0; uniform and renormalise ask for another row."""
    teacher = logits()
    targets = TopKTargets.sample(teacher, 9) if tail == "sampled" else TopKTargets.of_logits(teacher, K, tail=tail)
    value, gradient = value_and_gradient(lambda z: targets.compare(z, d.ReverseKL()), teacher)
    if tail in ("lump", "sampled"):
        assert value.abs().max() < 1e-12 and gradient.abs().max() < 1e-12
    else:
        assert (value > 0.01).all()
    if tail == "renormalise":
        found = targets.compare(teacher, d.ForwardKL())
        torch.testing.assert_close(found, -targets.log_probs.logsumexp(-1))  # -ln of the kept mass


@pytest.mark.parametrize("exponent, num_exact", [(1.0, 0), (0.7, 0), (1.0, 4)])
@pytest.mark.parametrize("divergence", [d.ForwardKL(), d.AlphaBeta(0.6, 0.3), d.JSD(), d.TotalVariation()], ids=str)
def test_the_mean_of_many_samples_is_dense(divergence, exponent, num_exact):
    num_samples = 3000
    student, teacher = (logits(1, 1.0).expand(num_samples, -1) for _ in range(2))
    targets = TopKTargets.sample(
        teacher, 8, exponent=exponent, num_exact=num_exact, generator=torch.Generator().manual_seed(3)
    )
    values, gradients = value_and_gradient(lambda z: targets.compare(z, divergence), student)
    truth = value_and_gradient(
        lambda z: divergence(student=z.log_softmax(-1), teacher=teacher[:1].log_softmax(-1)), student[:1]
    )
    for found, true in ((values.unsqueeze(-1), truth[0].unsqueeze(-1)), (gradients, truth[1])):
        assert ((found.mean(0) - true[0]).abs() <= 4 * found.std(0) / num_samples**0.5 + 1e-12).all()
    biased = values * 1.2
    assert (biased.mean() - truth[0]).abs() > 4 * biased.std() / num_samples**0.5  # the bar has teeth


def test_a_sample_keeps_what_it_says():
    teacher = logits(50, 1.0)
    targets = TopKTargets.sample(teacher, 7, num_exact=3, exponent=0.5, generator=torch.Generator().manual_seed(0))
    log_p = teacher.log_softmax(-1)
    is_kept = targets.log_probs > -math.inf
    torch.testing.assert_close(targets.log_probs[is_kept], log_p.gather(-1, targets.ids)[is_kept])
    weights = targets.log_weights.exp() * is_kept
    is_exact = torch.zeros_like(log_p).scatter(-1, log_p.topk(3).indices, 1.0)
    assert (weights[is_exact.gather(-1, targets.ids) == 1] == 1).all()
    chances = (0.5 * log_p).masked_fill(is_exact == 1, -math.inf).softmax(-1).gather(-1, targets.ids)
    counts = (7 * weights * chances)[is_kept & (is_exact.gather(-1, targets.ids) == 0)]
    torch.testing.assert_close(counts, counts.round())
    drawn = (7 * weights * chances).sum(-1)
    torch.testing.assert_close(drawn, torch.full_like(drawn, 7.0))
    assert is_kept.any(0).all()  # no column more than needed


def test_samples_of_a_one_hot_teacher_and_of_few_classes():
    teacher = torch.full((3, VOCAB), -math.inf)
    teacher[:, 2] = 0.0
    for num_exact in (0, 1):
        targets = TopKTargets.sample(teacher, 5, num_exact=num_exact)
        value = targets.compare(logits(3, dtype=torch.float32), d.ForwardKL())
        assert value.isfinite().all() and targets.tail_log_mass.isneginf().all()
    everything = TopKTargets.sample(logits(2, vocab=4), 2, num_exact=3)
    assert (everything.tail_log_mass == -math.inf).all()


def test_rows_of_fewer_classes_and_small_integers():
    teacher, student = logits(), logits()
    log_p = teacher.log_softmax(-1)
    full = TopKTargets.of_logits(teacher, 3, tail="uniform")
    padded = replace(
        full,
        ids=torch.nn.functional.pad(full.ids, (0, 2), value=int(full.ids[0, 0])).to(torch.uint8),
        log_probs=torch.nn.functional.pad(full.log_probs, (0, 2), value=-math.inf),
    )
    torch.testing.assert_close(padded.logits(1, 4), full.logits(1, 4))
    assert padded.logits(0, 5).exp().sum(-1).allclose(torch.ones(5, dtype=torch.float64))
    for tail in ("lump", "renormalise", "uniform"):
        found = (replace(targets, tail=tail).compare(student, d.AlphaBeta()) for targets in (padded, full))
        torch.testing.assert_close(*found)
    assert log_p.gather(-1, padded.ids.long()[:, :3]).equal(full.log_probs)


def test_mass_that_is_a_little_off_is_made_1():
    """Quantised log-probabilities; all tails see the same rows."""
    student, exact = logits(), TopKTargets.of_logits(logits(), K, tail="lump")
    rounded = replace(exact, log_probs=exact.log_probs + 0.004, tail_log_mass=exact.tail_log_mass + 0.004)
    for tail in ("lump", "uniform", "renormalise"):
        found = (replace(targets, tail=tail).compare(student, d.ForwardKL()) for targets in (rounded, exact))
        torch.testing.assert_close(*found)


def test_log_rests_are_summed_and_not_subtracted():
    """A teacher whose rest has mass 1e-12, which 1 - sum of the kept in fp32 does not know."""
    teacher = torch.tensor([[0.0, -27.6, -28.0, -math.inf]])
    targets = TopKTargets.of_logits(teacher, 1, tail="lump")
    assert targets.tail_log_mass.item() == pytest.approx(math.log(math.exp(-27.6) + math.exp(-28.0)), rel=1e-6)


def small():
    log_probs = torch.tensor([[0.5, 0.3], [0.9, 0.1]]).log()
    rest = torch.tensor([0.2, 0.0]).log()
    return {"ids": torch.tensor([[2, 0], [1, 3]]), "log_probs": log_probs, "tail_log_mass": rest, "vocab": 4}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ids": torch.zeros(2, 2)}, r"ids must be integers \[N, k\], k from 1 to vocab=4, got float32 \[2, 2\]"),
        ({"ids": torch.zeros(4, dtype=torch.long)}, r"ids must be integers \[N, k\], .*got int64 \[4\]"),
        ({"vocab": 1}, r"k from 1 to vocab=1, got int64 \[2, 2\]"),
        ({"log_probs": torch.zeros(2, 3)}, r"log_probs must be \[2, 2\] for these ids, got float32 \[2, 3\]"),
        ({"tail_log_mass": torch.zeros(2, 1)}, r"tail_log_mass must be \[2\] for these ids, got float32 \[2, 1\]"),
        ({"tail": "spread"}, "tail must be one of lump, uniform, renormalise, sampled, got 'spread'"),
        ({"tail": "sampled"}, "log_weights and tail=sampled go together"),
        ({"log_weights": torch.zeros(2, 2)}, "log_weights and tail=sampled go together"),
        ({"tail": "sampled", "log_weights": torch.zeros(2)}, r"log_weights must be \[2, 2\] for these ids"),
        (
            {"tail": "sampled", "log_weights": torch.tensor([[0.0, -math.inf], [0.0, 0.0]])},
            "log_weights must be finite where a class is kept; one of weight 0 is not kept",
        ),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"ids": torch.tensor([[2, 0], [1, 4]])}, "ids must lie between 0 and 3"),
        ({"ids": torch.tensor([[2, -1], [1, 3]])}, "ids must lie between 0 and 3"),
        ({"ids": torch.tensor([[2, 0], [3, 3]])}, "row 1 keeps a class twice"),
        ({"tail_log_mass": torch.tensor([0.3, 0.0]).log()}, "row 0 has 1.1; renormalise the kept ones, or give the"),
        ({"log_probs": torch.full((2, 2), math.nan)}, "row 0 has nan"),
        (
            {"log_probs": torch.full((2, 2), -math.inf), "tail_log_mass": torch.zeros(2)},
            "each row must keep a class, and row 0 keeps none",
        ),
        (
            {"ids": torch.tensor([[0, 1], [1, 0]]), "vocab": 2, "log_probs": torch.full((2, 2), math.log(0.4999))}
            | {"tail_log_mass": torch.full((2,), math.log(0.0002))},
            "tail_log_mass must be -inf where a row keeps all classes",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        TopKTargets(**({"tail": "lump"} | small() | change))


def test_another_temperature_is_refused_by_name():
    teacher = logits()
    targets = TopKTargets.of_logits(teacher, K, tail="lump", temperature=2.0)
    torch.testing.assert_close(targets.log_probs, TopKTargets.of_logits(teacher / 2, K, tail="lump").log_probs)
    targets.check_temperature(2.0)
    with pytest.raises(
        InputError, match=r"teacher_temperature is 1.0, .* were made at 2.0.*use teacher_temperature=2.0"
    ):
        targets.check_temperature(1.0)


def test_no_rows_and_another_device():
    empty = TopKTargets.of_logits(logits(0), K, tail="lump")
    assert empty.shape == (0, VOCAB)
    student = logits(0).requires_grad_()
    for tail in ("lump", "uniform", "renormalise"):
        value = replace(empty, tail=tail).compare(student, d.AlphaBeta())
        assert value.shape == (0,) and value.requires_grad
    assert TopKTargets.sample(logits(0), 3).shape == (0, VOCAB)
    assert TopKTargets.sample(logits(), 3).to("cpu").tail == "sampled"


def test_the_kinds_of_targets_say_what_may_ask_for_a_gradient():
    values = logits().requires_grad_()
    assert DenseTargets(values).tensors == [values]
    assert TopKTargets.of_logits(values, K, tail="lump").tensors == []
