import pytest
import torch

from abkd.analysis.mass import RANK_LABELS, RankMass
from abkd.analysis.movement import ERROR_LABELS, mass_step
from abkd.analysis.panels import mass_step_bars, rank_mass_bars
from abkd.divergences import ForwardKL, ReverseKL


def test_masses_stand_beside_the_teachers():
    masses = {name: RankMass(("1", "2+"), (x, 1 - x), (0.9, 0.1)) for name, x in (("before", 0.2), ("after", 0.6))}
    panel = rank_mass_bars(masses)
    assert panel.labels == ("1", "2+")
    assert panel.bars == {"teacher": (0.9, 0.1), "before": (0.2, 0.8), "after": (0.6, 0.4)}


def test_steps_are_compared_by_the_mass_they_move():
    student, teacher = torch.randn(3, 20), torch.randn(3, 20)
    steps = {
        name: mass_step(divergence, student=student, teacher=teacher, step_size=1e-3)
        for name, divergence in (("forward KL", ForwardKL()), ("reverse KL", ReverseKL()))
    }
    moved, shares, by_error, error_shares = mass_step_bars(steps)
    assert (moved.labels, by_error.labels) == (RANK_LABELS, ERROR_LABELS)
    for name, step in steps.items():
        gained = sum(abs(x) for x in by_error.bars[name])
        assert gained == pytest.approx(2, abs=0.5) and gained <= 2 + 1e-9  # buckets of both signs would lose some
        assert moved.bars[name] == pytest.approx([x / step.moved for x in step.by_rank.moved])
        assert sum(shares.bars[name]) == pytest.approx(1) and sum(error_shares.bars[name]) == pytest.approx(1)
