"""MixtureTargets against ln sum_i w_i p_i in fp64: rows, values and gradients, fused and dense."""

import math
from dataclasses import replace

import pytest
import torch

from abkd import InputError
from abkd.divergences import AlphaBeta, ForwardKL, ReverseKL, TotalVariation
from abkd.head import LMHead
from abkd.kernels import linear_divergence
from abkd.targets import DenseTargets, HiddenTargets, MixtureTargets, TopKTargets

VOCAB, ROWS = 23, 7


def make_parts():
    """Dense, hidden and top-k targets; and their rows, p `[ROWS, VOCAB]`, in fp64."""
    dense = 2 * torch.randn(ROWS, VOCAB)
    hidden, head = torch.randn(ROWS, 5), LMHead(torch.randn(VOCAB, 5), torch.randn(VOCAB))
    kept = TopKTargets.of_logits(2 * torch.randn(ROWS, VOCAB), 4, tail="uniform")
    evenly = (kept.tail_log_mass.double().exp() / (VOCAB - 4)).unsqueeze(-1).expand(-1, VOCAB)
    rows = [
        dense.double().softmax(-1),
        (hidden.double() @ head.weight.double().T + head.bias.double()).softmax(-1),
        evenly.scatter(-1, kept.ids, kept.log_probs.double().exp()),
    ]
    return [DenseTargets(dense), HiddenTargets(hidden, head), kept], rows


def mixed(rows, weights):
    return sum(weight * row for weight, row in zip(weights, rows, strict=True)) / sum(weights)


@pytest.mark.parametrize("weights", [(1, 1, 1), (5.0, 1e-4, 2.0), (1e-9, 1e-9, 3e-9)])
def test_the_rows_are_the_mean_and_the_weights_need_not_add_up(weights):
    parts, rows = make_parts()
    targets = MixtureTargets(parts, weights)
    assert targets.shape == (ROWS, VOCAB)
    torch.testing.assert_close(targets.logits(0, ROWS).double().exp(), mixed(rows, weights), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(targets.logits(3, 5), targets.logits(0, ROWS)[3:5])
    assert targets.logits(2, 2).shape == (0, VOCAB)


@pytest.mark.parametrize("teacher_temperature", [1.0, 2.0])
@pytest.mark.parametrize("path", ["reference", "chunked"])
@pytest.mark.parametrize("divergence", [AlphaBeta(), ForwardKL(), ReverseKL(), TotalVariation()], ids=str)
def test_values_and_gradients_are_those_of_the_dense_row(divergence, path, teacher_temperature):
    parts, rows = make_parts()
    weights = (3.0, 1.0, 2.0)
    hidden, weight = torch.randn(ROWS, 6, dtype=torch.float64), torch.randn(VOCAB, 6, dtype=torch.float64)
    each = torch.rand(ROWS)
    hidden.requires_grad_(), weight.requires_grad_()
    student = (hidden @ weight.T / 1.5).log_softmax(-1)
    teacher = (mixed(rows, weights).log() / teacher_temperature).log_softmax(-1)
    values = divergence(student=student, teacher=teacher)
    truth = (each.double() * values).sum()
    gradients = torch.autograd.grad(truth, (hidden, weight))

    ours = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    loss = linear_divergence(
        ours[0],
        LMHead(ours[1]),
        MixtureTargets(parts, weights),
        divergence=divergence,
        token_weights=each,
        temperature=1.5,
        teacher_temperature=teacher_temperature,
        path=path,
    )
    torch.testing.assert_close(loss.divergence.double(), values.detach(), rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(loss.total.double(), truth.detach(), rtol=2e-4, atol=1e-6)
    for found, true in zip(torch.autograd.grad(loss.total, ours), gradients, strict=True):
        assert (found.double() - true).norm() <= 1e-4 * true.norm()


def test_classes_that_all_or_some_forbid():
    forbidden = torch.randn(2, 5).masked_fill(torch.tensor([0, 0, 0, 1, 1]).bool(), -math.inf)
    other = torch.randn(2, 5).masked_fill(torch.tensor([0, 0, 0, 0, 1]).bool(), -math.inf)
    row = MixtureTargets([DenseTargets(forbidden), DenseTargets(other)], (1, 1)).logits(0, 2)
    torch.testing.assert_close(row.exp(), (forbidden.softmax(-1) + other.softmax(-1)) / 2)
    assert (row[:, 4] == -math.inf).all() and row[:, :4].isfinite().all()


def test_it_is_a_constant():
    values = torch.randn(2, 5, requires_grad=True)
    targets = MixtureTargets([DenseTargets(values), DenseTargets(values)], (1, 1))
    assert targets.tensors == [] and not targets.logits(0, 2).requires_grad


def test_what_does_not_fit_is_refused():
    (dense, hidden, kept), _ = make_parts()
    weights = (1, 1)
    with pytest.raises(InputError, match=r"tail=lump at temperature 1 have no row to mix; use tail=uniform or"):
        MixtureTargets([dense, replace(kept, tail="lump")], weights)
    with pytest.raises(InputError, match="tail=sampled at temperature 1 have no row to mix"):
        MixtureTargets([dense, TopKTargets.sample(torch.randn(ROWS, VOCAB), 3)], weights)
    with pytest.raises(InputError, match="tail=uniform at temperature 2 have no row to mix"):
        MixtureTargets([dense, replace(kept, temperature=2.0)], weights)
    with pytest.raises(InputError, match=r"must be of one shape \(N, vocab\), got \[\(7, 23\), \(6, 23\)\]"):
        MixtureTargets([dense, DenseTargets(torch.randn(6, VOCAB))], weights)
    with pytest.raises(InputError, match="of one shape"):
        MixtureTargets([hidden, DenseTargets(torch.randn(ROWS, VOCAB + 1))], weights)
    for wrong in ((1, 0), (1, -1), (1, math.nan), (math.inf, 1)):
        with pytest.raises(InputError, match="weights must be above 0, got"):
            MixtureTargets([dense, hidden], wrong)
    for parts, wrong in (([dense], weights), ([], ())):
        with pytest.raises(InputError, match="weights must be one for each of"):
            MixtureTargets(parts, wrong)
    assert MixtureTargets([replace(kept, tail="renormalise")], (1,)).shape == (ROWS, VOCAB)
