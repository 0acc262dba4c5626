"""The spread over seeds, beside scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from abkd.analysis.spread import Spread, pooled, t_quantile

GROUPS = ([1.0, 1.2, 0.9], [3.0, 3.5], [7.0])


@pytest.mark.parametrize("dof", [1, 2, 3, 4, 7, 20, 101])
def test_quantiles_of_t(dof):
    assert t_quantile(dof) == pytest.approx(stats.t.ppf(0.975, dof), rel=1e-8)
    assert t_quantile(dof, 0.5) == pytest.approx(stats.t.ppf(0.75, dof), rel=1e-8)


def test_the_spread_is_pooled_over_what_was_repeated():
    spread = pooled(GROUPS)
    squares = sum(((np.array(group) - np.mean(group)) ** 2).sum() for group in GROUPS)
    assert spread == Spread(pytest.approx(math.sqrt(squares / 3)), 3)
    assert pooled([[1.0], [2.0]]) is None and pooled([]) is None


def test_two_groups_differ_where_the_t_test_says_so():
    rng = np.random.default_rng(0)
    verdicts = set()
    for shift in np.linspace(0, 4, 40):
        ours, theirs = rng.normal(0, 1, 3).tolist(), rng.normal(shift, 1, 4).tolist()
        expected = stats.ttest_ind(ours, theirs).pvalue < 0.05
        assert pooled([ours, theirs]).differ(ours, theirs) == expected
        verdicts.add(bool(expected))
    assert verdicts == {True, False}
