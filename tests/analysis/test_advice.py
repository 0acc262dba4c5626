"""The overview against plain sums, and the rule at its two ends and between."""

import math

import pytest
import torch

from abkd.analysis.advice import GRID, Overview, OverviewMeter, advise


def test_the_overview_is_the_mean_over_rows():
    torch.manual_seed(0)
    student, teacher = (torch.randn(40, 30).double().mul(2).log_softmax(-1) for _ in range(2))
    meter = OverviewMeter()
    for start in range(0, 40, 16):
        meter(student[start : start + 16], teacher[start : start + 16])
    meter(student[:0], teacher[:0])
    found = meter.result()
    overlap = sum(min(p, q) for p, q in zip(teacher.exp().flatten().tolist(), student.exp().flatten().tolist())) / 40  # noqa: B905
    assert found.overlap == pytest.approx(overlap)
    assert (found.num_rows, found.num_classes) == (40, 30)
    assert found.teacher_entropy == pytest.approx(-(teacher.exp() * teacher).sum().item() / 40)
    assert found.student_entropy == pytest.approx(-(student.exp() * student).sum().item() / 40)
    assert found.outside_top == pytest.approx(1 - teacher.exp().amax(-1).mean().item())
    assert found.agreement == (student.argmax(-1) == teacher.argmax(-1)).double().mean().item()
    assert set(found.steps) == set(GRID) and all(step.num_rows == 24 for step in found.steps.values())


def overview(num_classes, overlap=0.5):
    return Overview(1, num_classes, 1.0, 1.0, 0.5, overlap, 0.5, {})


@pytest.mark.parametrize(
    "num_classes, overlap, point",
    [
        (2, 0.5, (0.8, 0.3)),
        (100, 0.5, (0.8, 0.3)),
        (50_257, 0.5, (0.2, 0.7)),
        (262_144, 0.5, (0.2, 0.7)),
        (round(math.sqrt(100 * 50_257)), 0.5, (0.5, 0.5)),
        (100, 0.1, (0.7, 0.3)),
        (50_257, 0.1, (0.1, 0.7)),
    ],
)
def test_the_rule_is_a_line_between_the_papers_two_settings(num_classes, overlap, point):
    advice = advise(overview(num_classes, overlap))
    assert (advice.alpha, advice.beta) == point
    assert all(a + b == pytest.approx(sum(point)) and a >= 0 and b >= 0 for a, b in advice.neighbours)
    assert advice.neighbours and len(advice.reasons) == (2 if overlap < 0.3 else 1)
