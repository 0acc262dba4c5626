"""Statistics of repeats, against scipy and by hand."""

import math
import random

import pytest
from scipy import stats

from abkd.tune.spread import Spread, pooled, t_quantile


@pytest.mark.parametrize("dof", [*range(1, 13), 30, 31, 500])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_the_quantile_is_students(dof, level):
    assert t_quantile(dof, level) == pytest.approx(stats.t.ppf((1 + level) / 2, dof), rel=1e-8)


def test_the_pooled_spread_by_hand():
    """Deviations -1, 0, 1 and -2, 2: squares 2 and 8, over 2 + 1 degrees of freedom; a lone measure adds none."""
    spread = pooled([[1.0, 2.0, 3.0], [4.0, 8.0], [100.0]])
    assert spread == Spread(pytest.approx(math.sqrt(10 / 3)), 3)
    assert spread.half_width(4) == pytest.approx(3.182446 * math.sqrt(10 / 3) / 2, rel=1e-6)
    assert spread.half_width(2, 3) == pytest.approx(3.182446 * math.sqrt(10 / 3) * math.sqrt(1 / 2 + 1 / 3), rel=1e-6)


def test_without_repeats_there_is_no_spread():
    assert pooled([]) is None and pooled([[1.0], [2.0]]) is None


def test_two_groups_differ_where_students_test_says_so():
    draw = random.Random(0)
    verdicts = []
    for _ in range(200):
        one = [draw.gauss(0, 1) for _ in range(draw.randint(2, 5))]
        other = [draw.gauss(draw.choice([0, 3]), 1) for _ in range(draw.randint(2, 5))]
        differs = pooled([one, other]).differ(one, other)
        assert differs == (stats.ttest_ind(one, other).pvalue < 0.05)
        verdicts.append(differs)
    assert 20 < sum(verdicts) < 180


def test_equal_repeats_leave_every_difference_a_difference():
    spread = pooled([[1.0, 1.0], [2.0, 2.0]])
    assert spread.differ([1.0, 1.0], [1.0 + 1e-9]) and not spread.differ([1.0, 1.0], [1.0])
