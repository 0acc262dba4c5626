"""Panels of rows and runs, by hand."""

import statistics

import pytest

from abkd import InputError
from abkd.analysis.sweep import MEASURES, Run, sensitivity, surface, validation_curves

ROWS = [
    {"alpha": 0.2, "beta": 0.7, "rouge_l": 20.0, "entropy": 2.0},
    {"alpha": 0.2, "beta": 0.7, "rouge_l": 24.0, "entropy": 2.2},
    {"alpha": 0.5, "beta": 0.7, "rouge_l": 21.0, "entropy": None},
    {"alpha": 0.2, "beta": 0.3, "rouge_l": 18.0, "entropy": 3.0},
    {"alpha": 1.0, "beta": 0.0, "forward_kl": 1.0},
]


def test_a_surface_is_the_mean_of_the_repeats():
    panel = surface(ROWS, "rouge_l")
    assert [tuple(point) for point in panel.points] == [(0.2, 0.3, 18, 1), (0.2, 0.7, 22, 2), (0.5, 0.7, 21, 1)]
    assert panel.best[:3] == (0.2, 0.7, 22.0)
    assert panel.value_label == "0 to 100, higher is better"
    rows = [row | {"forward_kl": row["rouge_l"]} for row in ROWS[:4]]
    lowest = surface(rows, "forward_kl")
    assert lowest.best[:3] == (0.2, 0.3, 18.0)
    assert surface([row | {"entropy": 1.0} for row in ROWS], "entropy").best is None


def test_a_surface_needs_three_points():
    assert surface(ROWS[:3], "rouge_l") is None
    assert surface([], "rouge_l") is None


def test_a_sweep_has_a_curve_for_each_other_exponent():
    along_alpha = sensitivity(ROWS, "alpha", "rouge_l")
    (curve,) = along_alpha.curves
    assert (curve.label, curve.x, curve.y) == ("β = 0.7", (0.2, 0.5), (22.0, 21.0))
    assert curve.spread == pytest.approx((statistics.stdev([20, 24]), 0.0))
    (curve,) = sensitivity(ROWS, "beta", "entropy").curves
    assert (curve.label, curve.x, curve.y) == ("α = 0.2", (0.3, 0.7), (3.0, pytest.approx(2.1)))
    assert sensitivity(ROWS, "alpha", "forward_kl") is None


def run(name="mine", alpha=0.2, beta=0.7, after=None, **lines):
    metrics = [{"step": 1, "loss": 2.0}] + [
        {"step": int(step[1:]), "validation_forward_kl": x} for step, x in lines.items()
    ]
    results = after and {"before": {"forward_kl": 3.0}, "after": after, "num_steps": 40, "student_step": 30}
    return Run(name, alpha, beta, metrics, results)


def test_curves_begin_with_the_student_before():
    runs = [run(s10=2.0, s20=1.5, after={"forward_kl": 1.2}), run("going", s10=2.5), run("silent", after={})]
    panel = validation_curves(runs, "forward_kl")
    finished, going = panel.curves
    assert (finished.label, finished.x, finished.y) == ("mine", (0, 10, 20, 30), (3.0, 2.0, 1.5, 1.2))
    assert (going.x, going.y) == ((10,), (2.5,))
    assert panel.y_label == "nats"
    assert validation_curves(runs, "rouge_l") is None
    assert validation_curves([], "forward_kl") is None


def test_a_run_is_a_row():
    sets = {"dolly": {"mean": 20.0, "self_bleu": 10.0}, "gsm8k": {"self_bleu": 30.0}, "greedy": {"self_bleu": None}}
    after = {"forward_kl": 1.0, "rouge_l": 20.0, "answers": ["a"], "sets": sets, "sets_mean": 25.0}
    assert run(after=after).row == {
        "alpha": 0.2, "beta": 0.7, "forward_kl": 1.0, "rouge_l": 20.0, "sets_mean": 25.0, "self_bleu": 20.0
    }  # fmt: skip
    assert run(after={"entropy": 2.0}).row == {"alpha": 0.2, "beta": 0.7, "entropy": 2.0}
    assert run().row is None
    assert run(alpha=None, after=after).row is None


def test_an_unknown_measure_is_named():
    with pytest.raises(InputError, match=r"measure must be one of forward_kl, .*, got 'bleu'"):
        surface(ROWS, "bleu")
    assert all(measure.better in ("lower", "higher", "") for measure in MEASURES.values())
