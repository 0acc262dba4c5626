import itertools

import pytest
import torch

from abkd.analysis.mass import RANK_EDGES, RankMassMeter


def test_mass_is_bucketed_by_the_teachers_rank():
    vocab = 1500
    teacher = torch.randn(6, vocab, dtype=torch.float64).mul(2).log_softmax(-1)
    student = torch.randn(6, vocab, dtype=torch.float64).mul(2).log_softmax(-1)
    meter = RankMassMeter()
    meter(student[:2], teacher[:2])
    meter(student[2:], teacher[2:])
    mass = meter.result()
    assert mass.labels == ("1", "2", "3-5", "6-10", "11-100", "101-1000", "1001+")
    order = teacher.argsort(-1, descending=True)
    edges = [*RANK_EDGES, vocab + 1]
    for name, rows in (("student", student), ("teacher", teacher)):
        ranked = rows.exp().gather(-1, order).mean(0)
        expected = [ranked[low - 1 : high - 1].sum().item() for low, high in itertools.pairwise(edges)]
        assert getattr(mass, name) == pytest.approx(expected)
    assert sum(mass.student) == pytest.approx(1)


def test_a_small_vocabulary_fills_the_first_buckets_alone():
    rows = torch.randn(3, 8).log_softmax(-1)
    meter = RankMassMeter()
    meter(rows, rows)
    mass = meter.result()
    assert mass.student == pytest.approx(mass.teacher)
    assert sum(mass.student) == pytest.approx(1, abs=1e-6)
    assert mass.student[4:] == (0, 0, 0)
    assert mass.student[3] == pytest.approx(
        rows.exp().sort(-1, descending=True).values[:, 5:].sum(-1).mean().item(), abs=1e-6
    )
