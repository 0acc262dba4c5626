"""The search on planted trainings: what is trained, in which order, what is not trained twice, what comes out."""

import contextlib
import dataclasses
import json
import math
import platform

import pytest
import yaml
from planted import Planted, open_in_memory, use_plain_memory
from test_points import recipe_of

from abkd import InputError
from abkd.recipe import parse_recipe, read_recipe
from abkd.tune import study as study_module
from abkd.tune.metrics import Metric
from abkd.tune.options import Search
from abkd.tune.plane import Line, Plane, Range
from abkd.tune.points import Point
from abkd.tune.runs import Diverged
from abkd.tune.search import tune
from abkd.tune.study import Study

SCORE, LOSS = Metric("score", True), Metric("score", False)
LINE = Plane(line=Line("alpha+beta", 1.0), alpha=Range(0, 1, 0.25))
ON_LINE = [Point(alpha, 1 - alpha) for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)]
NOISE = {None: 0.0, 4: 0.01, 5: -0.01, 6: 0.0}
"""Of the seeds of a recipe with seed 3."""


def score(point, seed, share):
    """Best at alpha = 0.5, second at 0.75."""
    return 1 - abs(point.alpha - 0.55) + NOISE[seed]


@contextlib.contextmanager
def searches(folder):
    """Runs searches in memory: (did it finish, the planted trainings, what was said)."""

    def run(search, train=score):
        said, planted = [], Planted(folder, train)
        study = Study("memory", "s", search, {}, folder)
        return tune(recipe_of(run_dir=str(folder)), study, planted, said.append), planted, said

    with pytest.MonkeyPatch.context() as monkeypatch:
        use_plain_memory(monkeypatch)
        yield run


@pytest.fixture
def search_of(tmp_path):
    with searches(tmp_path) as run:
        yield run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(its folder, the planted trainings, what was said) of `GRID`."""
    folder = tmp_path_factory.mktemp("search")
    with searches(folder) as run:
        done, planted, said = run(GRID)
    assert done
    return folder, planted, said


def report(folder):
    return json.loads((folder / "tune.json").read_text())


GRID = Search(SCORE, "grid", LINE, num_finalists=2, num_seeds=3)
SMALL = Search(SCORE, "grid", Plane(Range(0, 1, 0.5), line=Line("alpha+beta", 1.0)), num_finalists=1, num_seeds=2)
"""Three points, one finalist, two seeds."""


def test_a_grid_is_trained_in_order_and_its_best_points_again_under_new_seeds(finished):
    _, planted, said = finished
    assert planted.calls == [(f"trials/{number:03d}", point, None) for number, point in enumerate(ON_LINE)] + [
        (f"trials/{5 + 2 * index + order:03d}", point, seed)
        for index, seed in enumerate((4, 5, 6))  # the recipe's own is 3
        for order, point in enumerate((Point(0.5, 0.5), Point(0.75, 0.25)))
    ]
    assert said[0] == "searching 5 points for score, then the best 2 again under 3 seeds"
    assert said[1].startswith("trial 0 (1 of 5): alpha=0 beta=1: score 0.4500, ")
    assert said[2].endswith("best 0.7000 at alpha=0.25 beta=0.75")


def test_the_recommended_point_and_its_interval(finished):
    """Means 0.95 and 0.80; both finalists deviate by +-0.01: sd = sqrt(4e-4 / 4) = 0.01, t(4) = 2.776445."""
    found = report(finished[0])
    recommended = found["recommended"]
    half = 2.776445 * 0.01 / math.sqrt(3)
    assert (recommended["alpha"], recommended["beta"]) == (0.5, 0.5)
    assert recommended["mean"] == pytest.approx(0.95)
    assert recommended["interval"] == pytest.approx([0.95 - half, 0.95 + half])
    assert recommended["sd_over_seeds"] == pytest.approx(0.01) and recommended["dof"] == 4
    assert recommended["t"] == pytest.approx(2.776445)
    assert recommended["ranges_alike"] == {"alpha": [0.5, 0.5], "beta": [0.5, 0.5]}
    points = {point["alpha"]: point for point in found["points"]}
    assert points[0.75]["mean"] == pytest.approx(0.80) and points[0.75]["num_trainings"] == 3
    assert points[0.25]["num_trainings"] == 1 and not any(points[a]["is_alike"] for a in (0.0, 0.25, 0.75, 1.0))


def test_the_recipe_at_the_recommended_point(finished):
    folder = finished[0]
    best = read_recipe(str(folder / "best.yaml"))
    expected = recipe_of(run_dir=str(folder / "best")).to_dict()
    expected["objective"]["divergence"] |= {"alpha": 0.5, "beta": 0.5}
    text = (folder / "best.yaml").read_text()
    assert best == parse_recipe(expected) and text.startswith("# alpha=0.5 beta=0.5, by score\n")
    assert "extends" not in yaml.safe_load(text)


def test_trials_and_surface_are_written(finished):
    found = report(finished[0])
    assert [row["trial"] for row in found["trials"]] == list(range(11))
    assert found["trials"][1] | {"seconds": 0} == {
        "trial": 1, "state": "finished", "seed": None, "alpha": 0.25, "beta": 0.75, "learning_rate": None,
        "value": pytest.approx(0.7), "short": {}, "run": "trials/001", "seconds": 0, "host": platform.node(),
        "measures": {"score": pytest.approx(0.7), "count": 3},
    }  # fmt: skip
    assert [row["seed"] for row in found["trials"]][5:] == [4, 4, 5, 5, 6, 6]
    assert len(found["surface"]) == 11
    assert found["surface"][0] == {"alpha": 0, "beta": 1, "score": pytest.approx(0.45), "count": 3}


def test_students_stay_of_the_recommended_point_alone(finished):
    kept = sorted(path.parent.name for path in finished[0].glob("trials/*/student"))
    assert kept == ["002", "005", "007", "009"]


def test_lower_is_better_where_the_metric_says_so(search_of, tmp_path):
    search_of(dataclasses.replace(SMALL, metric=LOSS))
    assert report(tmp_path)["recommended"]["alpha"] == 0.0


def test_an_interrupted_search_goes_on_where_it_stopped(search_of):
    stops = iter([False, True])
    done, first, _ = search_of(SMALL, lambda *how: None if next(stops) else score(*how))
    assert not done and len(first.calls) == 2
    done, second, _ = search_of(SMALL)
    assert done and [name for name, *_ in second.calls] == [f"trials/{number:03d}" for number in range(1, 5)]
    assert second.calls[0] == first.calls[1]
    done, third, said = search_of(SMALL)
    assert done and third.calls == [] and any(line.startswith("recommended: alpha=0.5 beta=0.5") for line in said)


class Killed(BaseException):
    """kill -9, as far as one process can do it to itself."""


def test_a_killed_search_goes_on_where_it_stopped(search_of, tmp_path, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(study_module.Study, "put_back", lambda study, trial: None)
        killed.setattr(study_module, "this_process", lambda: {"host": platform.node(), "pid": 2**22 + 1, "started": 0})
        with pytest.raises(Killed):
            search_of(SMALL, lambda point, *how: Killed() if point.alpha == 0.5 else score(point, *how))
    assert [row["state"] for row in report(tmp_path)["trials"]] == ["finished", "waiting", "waiting"]
    done, planted, said = search_of(SMALL)
    assert done and said[0] == "trial 1 was left running; it goes on"
    assert [name for name, *_ in planted.calls] == [f"trials/{number:03d}" for number in range(1, 5)]
    assert [row["state"] for row in report(tmp_path)["trials"]] == ["finished"] * 5


@pytest.mark.parametrize("error", [InputError("run_dir: the disk is full"), KeyboardInterrupt(), ValueError("ours")])
def test_what_is_not_the_points_doing_ends_the_search_and_not_the_trial(search_of, error):
    with pytest.raises(type(error)):
        search_of(SMALL, lambda point, *how: error if point.alpha == 0.5 else score(point, *how))
    done, planted, _ = search_of(SMALL)
    assert done and planted.calls[0][:2] == ("trials/001", Point(0.5, 0.5))


def test_a_point_that_diverges_is_reported_and_the_others_go_on(search_of, tmp_path):
    outcomes = {0.0: Diverged("the loss is nan at step 3"), 0.25: math.nan}
    done, planted, said = search_of(GRID, lambda point, *how: outcomes.get(point.alpha) or score(point, *how))
    assert done and len(planted.calls) == 11
    states = {row["alpha"]: (row["state"], row.get("error")) for row in report(tmp_path)["trials"][:5]}
    assert states[0.0] == ("failed", "the loss is nan at step 3") and states[0.25] == ("failed", "score is nan")
    assert "trial 0 (1 of 5): alpha=0 beta=1: failed, the loss is nan at step 3" in said
    assert "alpha=0 beta=1: failed, the loss is nan at step 3" in said[-5:]
    assert report(tmp_path)["recommended"]["alpha"] == 0.5


def test_a_search_of_which_nothing_came_is_refused(search_of):
    with pytest.raises(InputError, match="no training came to an end, the first for: the loss is inf"):
        search_of(SMALL, lambda *how: Diverged("the loss is inf"))


def test_short_runs_come_first_and_the_worse_ones_are_pruned(search_of, tmp_path):
    """1/9, then 1/3, then all: of five, the best so far goes on; a short run's score is half of the whole one's."""
    search = Search(SCORE, "grid", LINE, num_rungs=3, num_finalists=1, num_seeds=2)
    _, planted, said = search_of(search, lambda point, seed, share: score(point, seed, share) * (0.5 + share / 2))
    names = [name for name, *_ in planted.calls]
    whole = [f"{folder}{number:03d}{rest}" for number in (0, 1, 2)
             for folder, rest in (("short/", "-1of9"), ("short/", "-1of3"), ("trials/", ""))]  # fmt: skip
    assert names == [*whole, "short/003-1of9", "short/004-1of9", "trials/005", "trials/006"]
    rows = report(tmp_path)["trials"]
    assert [row["state"] for row in rows] == ["finished"] * 3 + ["pruned"] * 2 + ["finished"] * 2
    assert rows[2]["short"] == {"0.1111": pytest.approx(0.95 * 5 / 9), "0.3333": pytest.approx(0.95 * 2 / 3)}
    assert len(report(tmp_path)["points"]) == 3 and len(report(tmp_path)["surface"]) == 5
    pruned = f"alpha=0.75 beta=0.25: pruned after 0.11 of the training, with score {0.8 * 5 / 9:.4f}"
    assert pruned in said and any("pruned after a short run" in line for line in said)
    assert not list((tmp_path / "short").glob("*/student"))


def test_all_students_stay_where_they_are_asked_for(search_of, tmp_path):
    search_of(dataclasses.replace(SMALL, num_finalists=0, keep_students=True))
    assert len(list(tmp_path.glob("trials/*/student"))) == 3


def test_without_finalists_nothing_is_called_a_difference(search_of, tmp_path):
    _, planted, said = search_of(dataclasses.replace(SMALL, num_finalists=0))
    assert len(planted.calls) == 3 and said[0] == "searching 3 points for score"
    found = report(tmp_path)
    assert found["recommended"]["alpha"] == 0.5 and found["recommended"]["interval"] is None
    assert all(point["is_alike"] for point in found["points"])
    assert any(line.endswith("one training each tells nothing of the spread") for line in said)


def test_a_search_can_be_prolonged(search_of, tmp_path):
    search_of(Search(SCORE, "random", num_trials=2, num_finalists=0))
    done, planted, _ = search_of(Search(SCORE, "random", num_trials=3, num_finalists=1, num_seeds=2))
    assert done and [name for name, *_ in planted.calls] == ["trials/002", "trials/003", "trials/004"]


def test_rates_are_searched_with_the_points(search_of, tmp_path):
    """At every point the second rate is better; the surface is that of each point's best rate."""
    search = dataclasses.replace(SMALL, rates=(1e-4, 3e-4))
    search_of(search, lambda point, *how: score(point, *how) + 1000 * point.learning_rate)
    found = report(tmp_path)
    assert len(found["trials"]) == 8 and found["recommended"]["learning_rate"] == 3e-4
    assert [row["alpha"] for row in found["surface"]] == [0, 0.5, 1, 0.5, 0.5]
    assert found["surface"][0]["score"] == pytest.approx(0.45 + 0.3)
    best = read_recipe(str(tmp_path / "best.yaml"))
    assert best.training.learning_rate == 3e-4


def test_the_finalists_wait_for_what_other_processes_are_busy_with(search_of, tmp_path, monkeypatch):
    other = Study("memory", "s", GRID, {}, tmp_path)
    waits = []

    def train(point, *how):
        if not waits:  # at the first trial another process takes the second, which is the best one
            waits.append(other.take())
        return score(point, *how)

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            other.note(waits[0], measures={"score": 5.0}, seconds=1)
            other.finish(waits[0], 5.0)

    monkeypatch.setattr("abkd.tune.search.time.sleep", sleep)
    done, planted, said = search_of(GRID, train)
    assert done and len(waits) == 3
    asked = [line for line in said if line.startswith("waiting for trial 1 on ")]
    assert len(asked) == 1 and asked[0].endswith("if nothing runs there, start again with --take-over")
    assert {point.alpha for _, point, seed in planted.calls if seed is not None} == {0.25, 0.5}


def test_what_a_process_leaves_that_dies_meanwhile_is_done(tmp_path, monkeypatch):
    """In a database: Optuna's storage without one looks for waiting trials after the last one alone."""
    waits = []

    def train(point, *how):
        if other.trials()[1].state == "waiting":
            other.take()
        return score(point, *how)

    def sleep(seconds):
        waits.append(seconds)
        monkeypatch.setattr(study_module, "is_gone", lambda owner: True)

    monkeypatch.setattr("abkd.tune.search.time.sleep", sleep)
    planted, recipe = Planted(tmp_path, train), recipe_of(run_dir=str(tmp_path))
    with open_in_memory(monkeypatch, tmp_path, SMALL) as study, open_in_memory(monkeypatch, tmp_path, SMALL) as other:
        assert tune(recipe, study, planted, lambda line: None)
    assert len(waits) == 1
    assert [name for name, *_ in planted.calls] == [f"trials/{number:03d}" for number in (0, 2, 1, 3, 4)]
