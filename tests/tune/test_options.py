"""The options of `abkd tune`, checked against a recipe."""

import argparse

import pytest
from test_points import recipe_of

from abkd import InputError
from abkd.tune.options import add_arguments, read_search
from abkd.tune.plane import Line, Range


def read(*arguments, recipe=None):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_search(parser.parse_args(arguments), recipe or recipe_of())


def test_the_defaults_are_the_papers_grid_and_three_finalists_of_three_seeds():
    search = read()
    assert (search.sampler, len(search.points), search.num_finalists, search.num_seeds) == ("paper", 37, 3, 3)
    assert search.shares == [1] and search.rates == () and search.metric.name == "token_agreement"


def test_every_option_is_read():
    search = read(
        "--sampler=tpe", "--trials=7", "--metric=forward_kl", "--alpha=0:0.5", "--beta=-0.5:1", "--line=alpha+beta=1",
        "--search-rate=1e-4,3e-4", "--rungs=3", "--finalists=2", "--seeds=4", "--sampler-seed=5", "--keep-students",
    )  # fmt: skip
    assert (search.sampler, search.num_trials, search.metric.name, search.points) == ("tpe", 7, "forward_kl", None)
    assert (search.plane.alpha, search.plane.line) == (Range(0, 0.5), Line("alpha+beta", 1))
    assert search.plane.beta.low == -0.5 and search.rates == (1e-4, 3e-4)
    assert search.shares == pytest.approx([1 / 9, 1 / 3, 1]) and search.shares[-1] == 1
    assert (search.num_finalists, search.num_seeds, search.seed, search.keep_students) == (2, 4, 5, True)


def test_a_grid_is_taken_at_every_rate():
    points = read("--sampler=grid", "--line=alpha=1", "--beta=0:1:0.5", "--search-rate=1e-4,3e-4").points
    assert points == [(1, beta, rate) for beta in (0, 0.5, 1) for rate in (1e-4, 3e-4)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--metric=bleu"], "--metric: 'bleu' is unknown; "),
        (["--metric=rouge_l"], "--metric: rouge_l is not measured under this recipe; "),
        (["--line=alpha+beta=3"], "--line: alpha+beta=3 misses alpha 0 to 1 and beta 0 to 1; "),
        (["--line=alpha+beta=0.5"], "--sampler: no point of the paper's grid is on alpha+beta=0.5; "),
        (["--alpha=1"], "--alpha: '1' is refused: "),
        (["--trials=0"], "--trials: 0 is refused: must be at least 1"),
        (["--finalists=-1"], "--finalists: -1 is refused: must be at least 0"),
        (["--sampler-seed=-1"], "--sampler-seed: -1 is refused: "),
        (["--seeds=1"], "--seeds: 1 is refused: a spread takes at least 2; "),
        (["--search-rate=fast"], "--search-rate: 'fast' is refused: "),
        (["--search-rate=1e-4,1e-4"], "--search-rate: '1e-4,1e-4' is refused: "),
        (["--search-rate=0"], "--search-rate: '0' is refused: "),
        (["--rungs=6"], "--rungs: 6 starts with 0.37 steps of training.num_steps=90; "),
    ],
)
def test_bad_options_are_one_line(arguments, message):
    with pytest.raises(InputError) as refused:
        read(*arguments)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_finalists_may_be_left_out():
    assert read("--finalists=0", "--seeds=0").num_finalists == 0


def test_a_recipe_without_alpha_and_beta_is_refused():
    with pytest.raises(InputError, match="has no alpha and beta to tune"):
        read(recipe=recipe_of(objective={"divergence": {"kind": "jsd"}}))


def test_without_optuna_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setattr("abkd.tune.options.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the package optuna; install it with pip install 'abkd\[tune\]'"):
        read()
