import pytest

from abkd.evaluation.rouge import rouge_l


def test_known_values():
    # longest common subsequence 3 of 4 and 3 words: precision 3/4, recall 1, F = 6/7
    assert rouge_l(["the cat likes milk"], [["the cat milk"]]) == [pytest.approx(100 * 6 / 7)]
    assert rouge_l(["running dogs"], [["run dog"]]) == [100]  # stems
    assert rouge_l(["a", "b"], [["a"], ["c"]]) == [100, 0]


def test_the_best_reference_counts():
    assert rouge_l(["the sun"], [["rain", "the sun", "sun"]]) == [100]
    assert rouge_l(["", "x"], [["y"], ["x"]]) == [0, 100]
