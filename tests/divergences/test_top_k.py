"""Each tail against the whole rows that it stands for, built by hand and in plain probabilities."""

import math

import pytest
import torch
from torch import nn

from abkd import InputError
from abkd import divergences as d
from abkd.divergences import KINDS
from abkd.divergences.top_k import Kept, degree, is_reduced

VOCAB, K = 23, 5
FAMILY = [d.AlphaBeta(*point) for point in ((0.2, 0.7), (1.0, 1.0), (0.5, 0.5), (1.2, -0.1), (-0.5, 1.2), (0.4, -0.4))]
DIVERGENCES = [*(kind() for kind in KINDS.values()), *FAMILY[1:]]
SUMS = [divergence for divergence in DIVERGENCES if degree(divergence) is not None]
NO_SUMS = {"akl", "bdkd", "alphanet", "alpha_mixture"}
F_DIVERGENCES = [
    d.ForwardKL(), d.ReverseKL(), d.SymmetricKL(), d.WSD(), d.JSD(), d.JSD(0.2), d.SkewedForwardKL(),
    d.SkewedReverseKL(), d.TotalVariation(), d.AlphaNet(), *(d.alpha_divergence(alpha) for alpha in (-1, 0.5, 0.2, 2)),
]  # fmt: skip
ROWS = {"random": (1.0, 1.0), "peaked": (6.0, 5.0), "flat": (0.05, 0.05), "disagreeing": (-4.0, 4.0)}


def logits_of(name="random", num_rows=7, vocab=VOCAB):
    """Student and teacher."""
    common = torch.randn(num_rows, vocab, dtype=torch.float64)
    student, teacher = ROWS[name]
    return student * common + 0.3 * torch.randn_like(common), teacher * common + 0.3 * torch.randn_like(common)


def kept_of(teacher, tail, k=K, log_weights=None):
    log_p = teacher.log_softmax(-1)
    log_probs, ids = log_p.topk(k)
    return Kept(ids, log_probs, log_p.scatter(-1, ids, -math.inf).logsumexp(-1), tail, log_weights)


def reduced(divergence, student, kept):
    return kept.compare(kept.see(student, divergence), divergence)


def value_and_gradient(function, student):
    student = student.clone().requires_grad_()
    value = function(student)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


def assert_same(ours, truth, tolerance=1e-11):
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, true, rtol=tolerance, atol=tolerance)


def lumped_by_hand(divergence, student, kept):
    """Sums of plain probabilities."""
    rows = torch.arange(len(student)).unsqueeze(-1)
    is_rest = torch.ones_like(student).index_put((rows, kept.ids), torch.tensor(0.0, dtype=student.dtype))
    q = student.softmax(-1)
    q_row = torch.cat([q[rows, kept.ids], (q * is_rest).sum(-1, keepdim=True)], -1)
    p_row = torch.cat([kept.log_probs.exp(), kept.log_rest.exp().unsqueeze(-1)], -1)
    return divergence(student=q_row.log(), teacher=p_row.log())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_lump_is_the_divergence_of_the_summed_rows(divergence, rows):
    student, teacher = logits_of(rows)
    kept = kept_of(teacher, "lump")
    truth = value_and_gradient(lambda z: lumped_by_hand(divergence, z, kept), student)
    assert_same(value_and_gradient(lambda z: reduced(divergence, z, kept), student), truth, 1e-9)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("divergence", SUMS, ids=str)
def test_renormalise_is_the_divergence_from_the_row_with_zeros(divergence, rows):
    student, teacher = logits_of(rows)
    kept = kept_of(teacher, "renormalise")
    if not is_reduced(divergence, "renormalise"):
        assert degree(divergence) <= 0  # +inf, and its rows are made
        return
    row = torch.full_like(teacher, -math.inf).scatter(-1, kept.ids, kept.log_probs).log_softmax(-1)
    truth = value_and_gradient(lambda z: divergence(student=z.log_softmax(-1), teacher=row), student)
    assert_same(value_and_gradient(lambda z: reduced(divergence, z, kept), student), truth)


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("divergence", SUMS, ids=str)
def test_the_expectation_over_every_draw_is_the_dense_value_and_gradient(divergence, exponent):
    """One draw can be any class: the sum over all of chance times estimate needs no statistics."""
    student, teacher = logits_of(num_rows=3)
    log_p = teacher.log_softmax(-1)
    chances = (exponent * log_p).softmax(-1)

    def expectation(z):
        total = torch.zeros(len(z), dtype=z.dtype)
        for drawn in range(VOCAB):
            ids = torch.full((len(z), 1), drawn)
            rest = log_p.scatter(-1, ids, -math.inf).logsumexp(-1)
            kept = Kept(ids, log_p[:, drawn : drawn + 1], rest, "sampled", -chances[:, drawn : drawn + 1].log())
            total = total + chances[:, drawn] * reduced(divergence, z, kept)
        return total

    truth = value_and_gradient(lambda z: divergence(student=z.log_softmax(-1), teacher=log_p), student)
    assert_same(value_and_gradient(expectation, student), truth)


def test_a_sample_of_forward_kl_has_the_gradient_of_the_sampled_row():
    """q sum(w p) - w p, that of a cross-entropy with the weighted row."""
    student, teacher = logits_of()
    log_weights = torch.randn(7, K, dtype=torch.float64)
    kept = kept_of(teacher, "sampled", log_weights=log_weights)
    row = torch.zeros_like(student).scatter(-1, kept.ids, (kept.log_probs + log_weights).exp())
    _, gradient = value_and_gradient(lambda z: reduced(d.ForwardKL(), z, kept), student)
    assert_same([gradient], [student.softmax(-1) * row.sum(-1, keepdim=True) - row])


@pytest.mark.parametrize("tail", ["lump", "renormalise", "sampled"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_all_classes_kept_is_dense(divergence, tail):
    if tail == "sampled" and degree(divergence) is None:
        with pytest.raises(InputError, match=f"{divergence.kind} is no sum over classes; use tail=lump or"):
            is_reduced(divergence, tail)
        return
    if not is_reduced(divergence, tail):
        return
    student, teacher = logits_of()
    kept = kept_of(teacher, tail, VOCAB, torch.zeros_like(teacher) if tail == "sampled" else None)
    truth = value_and_gradient(
        lambda z: divergence(student=z.log_softmax(-1), teacher=teacher.log_softmax(-1)), student
    )
    assert_same(value_and_gradient(lambda z: reduced(divergence, z, kept), student), truth)


@pytest.mark.parametrize("divergence", SUMS, ids=str)
def test_a_sum_adds_over_classes_and_scales_by_its_degree(divergence):
    """What un-normalised rows give: the same f for every class, whatever the others are."""
    student, teacher = (x.log_softmax(-1) + 0.3 for x in logits_of())
    whole = divergence(student=student, teacher=teacher)
    by_class = divergence(student=student.unsqueeze(-1), teacher=teacher.unsqueeze(-1))
    torch.testing.assert_close(by_class.sum(-1), whole, rtol=1e-11, atol=1e-13)
    assert (by_class >= 0).all()
    scaled = divergence(student=student + math.log(3), teacher=teacher + math.log(3))
    torch.testing.assert_close(scaled, 3 ** degree(divergence) * whole, rtol=1e-11, atol=1e-13)


def test_which_are_sums():
    assert {kind for kind in KINDS if degree(KINDS[kind]()) is None} == NO_SUMS
    assert degree(d.AlphaBeta(0.5, 0.25)) == 0.75


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("divergence", F_DIVERGENCES, ids=str)
def test_lump_bounds_an_f_divergence_from_below(divergence, rows):
    student, teacher = logits_of(rows, num_rows=200)
    dense = divergence(student=student.log_softmax(-1), teacher=teacher.log_softmax(-1))
    for k in (1, K, VOCAB - 1):
        found = reduced(divergence, student, kept_of(teacher, "lump", k))
        assert (found <= dense * (1 + 1e-9) + 1e-12).all()
        assert (found > 0).all()


def test_off_the_line_lump_bounds_nothing():
    """Both signs: errors of one sign in the rest add before they are squared, those of both signs cancel."""
    teacher = torch.tensor([[0.4, 0.3, 0.3], [0.4, 0.3, 0.3]], dtype=torch.float64).log()
    student = torch.tensor([[0.6, 0.2, 0.2], [0.4, 0.5, 0.1]], dtype=torch.float64).log()
    dense = d.EUCLIDEAN(student=student, teacher=teacher)
    lump = reduced(d.EUCLIDEAN, student, kept_of(teacher, "lump", 1))
    torch.testing.assert_close(dense, torch.tensor([0.03, 0.04], dtype=torch.float64))
    torch.testing.assert_close(lump, torch.tensor([0.04, 0.0], dtype=torch.float64))


def test_what_lump_leaves_out_of_forward_kl_is_the_divergence_inside_the_rest():
    """The chain rule: KL(p || q) = lump + p_R KL(p_R || q_R), both renormalised over the rest."""
    student, teacher = logits_of()
    kept = kept_of(teacher, "lump")
    inside = [x.scatter(-1, kept.ids, -math.inf).log_softmax(-1) for x in (student, teacher)]
    left_out = kept.log_rest.exp() * d.forward_kl(student=inside[0], teacher=inside[1])
    dense = d.forward_kl(student=student.log_softmax(-1), teacher=teacher.log_softmax(-1))
    torch.testing.assert_close(reduced(d.ForwardKL(), student, kept) + left_out, dense)


@pytest.mark.parametrize("divergence", [d.AlphaBeta(), d.ForwardKL(), d.ReverseKL(), d.JSD()], ids=str)
@pytest.mark.parametrize("tail", ["lump", "renormalise", "sampled"])
def test_gradcheck(divergence, tail):
    student, teacher = logits_of(num_rows=3, vocab=9)
    if tail == "renormalise" and divergence == d.ReverseKL():
        return  # +inf
    kept = kept_of(teacher, tail, 4, torch.randn(3, 4, dtype=torch.float64) if tail == "sampled" else None)
    assert torch.autograd.gradcheck(lambda z: reduced(divergence, z, kept), student.requires_grad_())


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_sums_entropy_and_totals_are_those_of_torch(power):
    student, teacher = logits_of()
    kept = kept_of(teacher, "lump")
    seen = kept.see(student, d.ForwardKL(), (power,))
    rest = student.scatter(-1, kept.ids, -math.inf)
    torch.testing.assert_close(seen.sums[power], (power * rest).logsumexp(-1, keepdim=True))
    torch.testing.assert_close(seen.total(power), (power * student).logsumexp(-1, keepdim=True))
    torch.testing.assert_close(seen.kept, student.gather(-1, kept.ids))
    torch.testing.assert_close(seen.entropy, torch.distributions.Categorical(logits=student).entropy())


def test_the_gradient_through_sums_and_kept_logits_is_that_of_torch():
    """The last entry keeps nothing: it is a constant -inf, and its class is in the rest."""
    student, teacher = logits_of()
    kept, weights = kept_of(teacher, "lump"), torch.randn(7, K + 2, dtype=torch.float64)
    kept.log_probs[:, -1] = -math.inf

    def ours(z):
        seen = kept.see(z, d.ForwardKL(), (0.5,))
        return (weights * torch.cat([seen.kept, seen.sums[1.0], seen.sums[0.5]], -1)).sum(-1)

    def plain(z):
        there = z.gather(-1, kept.ids).masked_fill(kept.log_probs.isneginf(), -math.inf)
        rest = z.scatter(-1, kept.ids[:, :-1], -math.inf)
        parts = [there, rest.logsumexp(-1, keepdim=True), (0.5 * rest).logsumexp(-1, keepdim=True)]
        return (weights * torch.cat(parts, -1)).sum(-1)

    assert_same(value_and_gradient(ours, student), value_and_gradient(plain, student))


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_a_rest_far_below_or_above_the_kept_class_is_exact(scale):
    """ln(1 - q) of a q in plain fp32 would be -inf, or all digits lost."""
    student, teacher = torch.tensor([[scale, 0.0, 0.0, 0.0]]), torch.tensor([[3.0, 0.0, 0.0, 0.0]])
    p = teacher.softmax(-1)
    value, gradient = value_and_gradient(lambda z: reduced(d.ForwardKL(), z, kept_of(teacher, "lump", 1)), student)
    dense = d.forward_kl(student=student.log_softmax(-1), teacher=p.log())
    torch.testing.assert_close(value, dense)  # both rests are even, so that lump leaves nothing out
    torch.testing.assert_close(gradient, student.softmax(-1) - p)


def one_row(*values):
    return torch.tensor([values])


@pytest.mark.parametrize("divergence", SUMS, ids=str)
@pytest.mark.parametrize("tail", ["lump", "renormalise", "sampled"])
@pytest.mark.parametrize(
    "case", ["forbidden kept", "forbidden rest", "no rest", "one-hot teacher", "all forbidden rest"]
)
def test_edges_have_a_finite_gradient_and_no_nan(divergence, tail, case):
    if not is_reduced(divergence, tail):
        return
    student, ids = one_row(1.0, 0.0, -1.0, 0.5), torch.tensor([[0, 1]])
    log_probs, log_rest = one_row(0.6, 0.3).log(), torch.tensor([0.1]).log()
    if case == "forbidden kept":
        student[0, 1] = -math.inf
    elif case == "forbidden rest":
        student[0, 2] = -math.inf
    elif case == "all forbidden rest":
        student[0, 2:] = -math.inf
    elif case == "no rest":
        ids, log_probs, log_rest = (
            torch.tensor([[3, 0, 1, 2]]),
            one_row(0.6, 0.2, 0.1, 0.1).log(),
            one_row(-math.inf)[0],
        )
    else:
        log_probs, log_rest = one_row(0.0, -math.inf), one_row(-math.inf)[0]
    kept = Kept(ids, log_probs, log_rest, tail, 0.5 * torch.ones_like(log_probs) if tail == "sampled" else None)
    value, gradient = value_and_gradient(lambda z: reduced(divergence, z, kept), student)
    assert not value.isnan().any() and gradient.isfinite().all()
    if divergence == d.ForwardKL() and tail == "lump":
        assert value.isinf().all() == (case in ("forbidden kept", "all forbidden rest"))


def test_nan_in_gives_nan_out():
    student, teacher = logits_of()
    student[2, 3] = math.nan
    for tail in ("lump", "renormalise"):
        assert reduced(d.AlphaBeta(), student, kept_of(teacher, tail)).isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize("tail", ["lump", "renormalise", "sampled"])
def test_an_entry_that_keeps_nothing_is_part_of_the_rest(tail):
    """Its id may be any, that of a kept class too."""
    student, teacher = logits_of()
    fewer = kept_of(teacher, tail, 3, torch.full((7, 3), 0.3, dtype=torch.float64) if tail == "sampled" else None)
    ids = nn.functional.pad(fewer.ids, (0, 2))
    ids[:, 4] = fewer.ids[:, 1]
    log_probs = nn.functional.pad(fewer.log_probs, (0, 2), value=-math.inf)
    weights = torch.full((7, 5), 0.3, dtype=torch.float64) if tail == "sampled" else None
    padded = Kept(ids, log_probs, fewer.log_rest, tail, weights)
    for divergence in SUMS:
        if is_reduced(divergence, tail):
            found = [
                value_and_gradient(lambda z, div=divergence, kept=kept: reduced(div, z, kept), student)
                for kept in (padded, fewer)
            ]
            assert_same(*found)
