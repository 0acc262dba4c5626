"""What the trials of a search say, on trials written by hand."""

import json
import math
from dataclasses import replace

import pytest

from abkd.analysis.spread import Spread
from abkd.tune.metrics import Metric
from abkd.tune.options import Search
from abkd.tune.points import Point
from abkd.tune.study import Trial
from abkd.tune.summary import NUM_SHOWN, as_json, conclude, finalists, lines, surface_rows

LOSS = Search(Metric("loss", False), num_finalists=2)
A, B, C, D = (Point(alpha, 0.5) for alpha in (0.1, 0.2, 0.3, 0.4))


def trial(number, point, value, seed=None, state="finished", short=None, **noted):
    return Trial(number, state, point, seed, value, short or {}, {"measures": {"loss": value}, **noted})


SEARCHED = [trial(0, A, 3.0), trial(1, B, 1.0), trial(2, C, 2.0), trial(3, D, 1.2)]
REPEATED = [*SEARCHED, trial(4, B, 1.5, 7), trial(5, D, 1.3, 7), trial(6, B, 1.7, 8), trial(7, D, 1.1, 8)]
"""B: 1.6, D: 1.2, each 0.1 on either side of its mean: sd = sqrt(0.04 / 2), t(2) = 4.302653."""
HALF_OF_TWO = 4.302653 * math.sqrt(0.02) * math.sqrt(1 / 2 + 1 / 2)
HALF_OF_TWO_AND_ONE = 4.302653 * math.sqrt(0.02) * math.sqrt(1 / 2 + 1)


def test_the_finalists_are_the_best_of_the_search():
    assert finalists(LOSS, SEARCHED) == [B, D]
    assert finalists(LOSS, [*REPEATED, trial(8, D, 0.5, 9)]) == [B, D]
    assert finalists(replace(LOSS, metric=Metric("loss", True)), SEARCHED) == [A, C]
    unfinished = [replace(each, state="pruned") if each.point == B else each for each in SEARCHED]
    assert finalists(LOSS, unfinished) == [D, C]


def test_a_finalist_counts_by_its_own_seeds_and_not_by_what_chose_it():
    found = conclude(LOSS, REPEATED)
    assert found.best == D
    assert {point: pytest.approx(values) for point, values in found.values.items()} == {
        D: [1.3, 1.1], B: [1.5, 1.7], C: [2.0], A: [3.0]
    }  # fmt: skip
    assert list(found.values) == [D, B, C, A]
    assert found.spread == Spread(pytest.approx(math.sqrt(0.02)), 2)
    half = 4.302653 * math.sqrt(0.02) / math.sqrt(2)
    assert found.interval == pytest.approx((1.2 - half, 1.2 + half))


def test_what_is_not_told_apart():
    """From D, 1.2: B is 0.4 away and needs 0.61, C is 0.8 away and needs 0.75, A is 1.8 away."""
    assert (round(HALF_OF_TWO, 2), round(HALF_OF_TWO_AND_ONE, 2)) == (0.61, 0.75)
    found = conclude(LOSS, REPEATED)
    assert found.alike == [D, B]
    assert found.ranges == {"alpha": (0.2, 0.4), "beta": (0.5, 0.5)}
    nearer = [replace(each, value=1.9) if each.point == C else each for each in REPEATED]
    assert conclude(LOSS, nearer).alike == [D, B, C]


def test_a_point_that_looks_better_is_not_called_worse():
    """One training of another point, far below all others, is no finalist yet: the next finalists are to tell."""
    lucky = [*REPEATED, trial(8, Point(0.9, 0.1), -5.0)]
    found = conclude(LOSS, lucky)
    assert found.best == D and Point(0.9, 0.1) in found.alike


def test_without_repeats_the_best_training_is_recommended_and_nothing_told_apart():
    found = conclude(LOSS, SEARCHED)
    assert (found.best, found.spread, found.interval) == (B, None, None)
    assert set(found.alike) == {A, B, C, D}


def test_without_a_finished_training_there_is_no_conclusion():
    waiting = [replace(each, state=state, value=None) for each, state in zip(SEARCHED, ("waiting", "running", "failed"),
               strict=False)]  # fmt: skip
    assert conclude(LOSS, waiting) is None and surface_rows(LOSS, waiting) == []
    assert as_json(LOSS, waiting)["recommended"] is None and lines(LOSS, waiting) == ["no training finished"]


def test_the_surface_has_a_row_for_each_finished_training():
    pruned = [*REPEATED, trial(8, Point(0.9, 0.1), 2.5, state="pruned", short={1 / 3: 2.5})]
    rows = surface_rows(LOSS, pruned)
    assert [(row["alpha"], row["loss"]) for row in rows] == [(each.point.alpha, each.value) for each in REPEATED]
    assert all(row["beta"] == 0.5 for row in rows)


def test_the_surface_is_that_of_each_points_best_rate():
    rated = [trial(0, Point(0.1, 0.5, 1e-4), 2.0), trial(1, Point(0.1, 0.5, 3e-4), 1.0),
             trial(2, Point(0.2, 0.5, 1e-4), 3.0), trial(3, Point(0.2, 0.5, 3e-4), 4.0)]  # fmt: skip
    assert [row["loss"] for row in surface_rows(LOSS, rated)] == [1.0, 3.0]


def test_the_json_is_json_and_says_what_the_conclusion_says():
    found = json.loads(json.dumps(as_json(LOSS, REPEATED)))
    assert found["metric"] == "loss" and found["greater_is_better"] is False and found["sampler"] == "paper"
    assert (found["alpha"], found["beta"], found["line"]) == ([0, 1], [0, 1], None)
    assert found["recommended"]["alpha"] == 0.4 and found["recommended"]["t"] == pytest.approx(4.302653)
    assert [(row["alpha"], row["is_alike"]) for row in found["points"]] == [(0.4, True), (0.2, True), (0.3, False),
                                                                            (0.1, False)]  # fmt: skip
    assert found["points"][0]["sd"] == pytest.approx(math.sqrt(0.02)) and found["points"][2]["sd"] is None


def test_the_table_names_every_verdict():
    pruned = trial(8, Point(0.9, 0.1), 2.5, state="pruned", short={1 / 9: 2.0, 1 / 3: 2.5})
    failed = trial(9, Point(0.8, 0.1), None, state="failed", error="the loss is nan at step 2")
    assert lines(LOSS, [*REPEATED, pruned, failed]) == [
        "   alpha     beta          loss (lower is better)",
        "     0.4      0.5          1.2000 ± 0.1414 (2 seeds)  recommended",
        "     0.2      0.5          1.6000 ± 0.1414 (2 seeds)  not told apart",
        "     0.3      0.5          2.0000  worse",
        "     0.1      0.5          3.0000  worse",
        "alpha=0.9 beta=0.1: pruned after 0.33 of the training, with loss 2.5000",
        "alpha=0.8 beta=0.1: failed, the loss is nan at step 2",
        "recommended: alpha=0.4 beta=0.5, loss 1.2000, 95 % interval over seeds 0.7697 to 1.6303",
        "not told apart from it: 1 of 3 points, alpha 0.2 to 0.4, beta 0.5 to 0.5; a difference counts above "
        "t(2) sd sqrt(1/n + 1/m) = 4.30 x 0.14 x sqrt(1/n + 1/m), for n and m seeds",
    ]


def test_a_long_table_is_cut():
    many = [trial(number, Point(number / 100, 0.5), float(number)) for number in range(NUM_SHOWN + 3)]
    shown = lines(LOSS, many)
    assert len(shown) == 1 + NUM_SHOWN + 1 + 1 and shown[-2] == "... and 3 more"
