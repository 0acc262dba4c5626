"""The queue of trials: one process each, nothing lost with a process, nothing mixed up. Storages are in memory."""

import contextlib
import os
import subprocess
import sys
import time

import optuna
import psutil
import pytest
from planted import open_in_memory, use_plain_memory
from test_points import recipe_of

from abkd import InputError
from abkd.tune import study as study_module
from abkd.tune.metrics import Metric
from abkd.tune.options import Search
from abkd.tune.plane import Line, Plane
from abkd.tune.points import Point
from abkd.tune.study import Job, Study

SCORE = Metric("score", True)
POINTS = [Point(0.1, 0.7), Point(0.2, 0.6), Point(0.3, 0.5)]
JOBS = [Job(str(point), point) for point in POINTS]


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens studies on one storage, without a database."""
    use_plain_memory(monkeypatch)
    return lambda search=None, same=None, name="s": Study(
        "memory", name, search or Search(SCORE), same or {"s": 0}, tmp_path
    )


@pytest.fixture
def opened_in_database(tmp_path, monkeypatch):
    """Opens studies in one database."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(open_in_memory(monkeypatch, tmp_path, Search(SCORE)))


@pytest.fixture
def dead_owner():
    """What a process of this machine that has ended said of itself."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return study_module.this_process() | {"pid": process.pid}


@pytest.fixture
def zombie_owner():
    """What a process said of itself that has ended, and that its parent has not asked for yet."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    yield study_module.this_process() | {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
    process.wait()


def take_all(study):
    taken = []
    while trial := study.take():
        taken.append(trial)
    return taken


def test_trials_come_in_the_order_of_the_queue(opened):
    study = opened()
    study.queue(JOBS)
    study.queue(JOBS)  # once
    taken = take_all(study)
    assert [(each.number, each.point, each.state) for each in taken] == [
        (number, point, "running") for number, point in enumerate(POINTS)
    ]
    study.note(taken[0], seconds=2.5, measures={"score": 0.5})
    study.finish(taken[0], 0.5)
    study.fail(taken[1], "the loss is nan")
    first, second, third = study.trials()
    assert (first.state, first.value, first.noted["seconds"]) == ("finished", 0.5, 2.5)
    assert (second.state, second.value, second.noted["error"]) == ("failed", None, "the loss is nan")
    assert third.state == "running" and third.seed is None


def test_two_processes_never_take_the_same_trial(opened_in_database):
    one, other = opened_in_database(), opened_in_database()
    one.queue(JOBS)
    first, second, third = one.take(), other.take(), one.take()
    assert [first.point, second.point, third.point] == POINTS and other.take() is None
    assert [each.number for each in one.running_elsewhere()] == [1]
    assert [each.number for each in other.running_elsewhere()] == [0, 2]


def test_a_job_queued_by_two_machines_at_once_is_done_once(opened_in_database):
    study = opened_in_database()
    study.queue(JOBS[:1])
    study._study.enqueue_trial({"alpha": 0.1, "beta": 0.7}, {"key": JOBS[0].key, "seed": None})
    assert len(take_all(study)) == 1
    assert len(study.trials()) == 1


def test_a_trial_that_another_machine_took_first_is_not_made_up(opened, monkeypatch):
    """The lock is the folder's; a machine with another folder may empty the queue between a look and a take."""
    study, elsewhere = opened(), opened()
    study.queue(JOBS[:1])
    sampler = study._sampler

    def slow(number):
        if study_module.locked is not unlocked:
            monkeypatch.setattr(study_module, "locked", unlocked)
            elsewhere.take()
        return sampler(number)

    monkeypatch.setattr(study, "_sampler", slow)
    assert study.take() is None
    assert [each.point for each in study.trials()] == POINTS[:1]


def unlocked(folder):
    return contextlib.nullcontext()


def test_what_a_killed_process_was_busy_with_waits_again(opened_in_database, dead_owner, monkeypatch):
    study = opened_in_database()
    study.queue(JOBS)
    with monkeypatch.context() as killed:
        killed.setattr(study_module, "this_process", lambda: dead_owner)
        torn = study.take()
    alive = study.take()
    again = opened_in_database()
    assert [each.number for each in again.put_back_abandoned()] == [torn.number]
    assert [each.number for each in again.running_elsewhere()] == [alive.number]
    repeated = again.take()
    assert (repeated.number, repeated.point) == (torn.number, torn.point)
    again.finish(repeated, 1.0)
    assert [each.state for each in again.trials()] == ["finished", "running", "waiting"]


def test_a_zombie_is_busy_with_nothing(opened, zombie_owner, monkeypatch):
    study = opened()
    study.queue(JOBS)
    with monkeypatch.context() as killed:
        killed.setattr(study_module, "this_process", lambda: zombie_owner)
        study.take()
    assert [each.number for each in opened().put_back_abandoned()] == [0]


def test_a_process_that_has_another_ones_number_is_another(opened, monkeypatch):
    study = opened()
    study.queue(JOBS)
    owner = study_module.this_process()
    monkeypatch.setattr(study_module, "this_process", lambda: owner | {"started": owner["started"] - 3600})
    study.take()
    assert owner["pid"] == os.getpid() and [each.number for each in opened().put_back_abandoned()] == [0]


def test_another_machines_trial_is_left_alone_unless_it_is_taken_over(opened, dead_owner, monkeypatch):
    study = opened()
    study.queue(JOBS)
    monkeypatch.setattr(study_module, "this_process", lambda: dead_owner | {"host": "elsewhere"})
    study.take()
    again = opened()
    assert again.put_back_abandoned() == []
    assert [each.number for each in again.put_back_abandoned(even_elsewhere=True)] == [0]
    assert again.take().point == POINTS[0]


def test_a_trial_that_is_put_back_waits_with_its_draw(opened):
    study = opened(Search(SCORE, "random"))
    study.queue([Job("draw 0"), Job("draw 1")])
    drawn = study.take()
    study.put_back(drawn)
    assert study.trials()[0].state == "waiting"
    assert study.take().point == drawn.point


@pytest.mark.parametrize("sampler, count", [("random", 4), ("tpe", 12)])
def test_draws_depend_on_the_study_and_not_on_the_process(opened, sampler, count):
    """The first 10 draws of TPE are random."""
    search = Search(SCORE, sampler, rates=(1e-4, 3e-4))
    jobs = [Job(f"draw {number}") for number in range(count)]

    def drawn(*studies):
        studies[0].queue(jobs)
        points = []
        for number in range(len(jobs)):
            study = studies[number % len(studies)]
            trial = study.take()
            study.finish(trial, -abs(trial.point.alpha - 0.5))
            points.append(trial.point)
        return points

    alone = drawn(opened(search, name="alone"))
    assert drawn(opened(search, name="two"), opened(search, name="two")) == alone
    assert len(set(alone)) == count and {point.learning_rate for point in alone} == {1e-4, 3e-4}
    assert all(0 <= point.alpha <= 1 and 0 <= point.beta <= 1 for point in alone)
    jobs = jobs[:1]
    assert drawn(opened(Search(SCORE, sampler, rates=(1e-4, 3e-4), seed=1), name="seed 1")) != alone[:1]


def test_draws_stay_on_the_line(opened):
    line = Line("alpha+beta", 0.9)
    study = opened(Search(SCORE, "random", Plane(line=line)))
    study.queue([Job(f"draw {number}") for number in range(5)])
    points = [trial.point for trial in take_all(study)]
    assert len(set(points)) == 5 and all(line.holds(point.alpha, point.beta) for point in points)


def test_short_runs_are_halved_by_asha(opened):
    """A run goes on where it is in the best third of those that got as far, or the best of fewer than three."""
    study = opened(Search(SCORE, num_rungs=2))
    values = [0.5, 0.4, 0.6, 0.3, 0.55, 0.7, 0.65, 0.9]
    jobs = [Job(str(number), Point(number / 10, 0.5)) for number in range(len(values))]
    study.queue(jobs)
    went_on = []
    for trial, value in zip(take_all(study), values, strict=True):
        went_on.append(study.goes_on(trial, 0, value))
        study.finish(trial, value) if went_on[-1] else study.prune(trial)
    expected = [
        value >= sorted(values[: count + 1], reverse=True)[max((count + 1) // 3, 1) - 1]
        for count, value in enumerate(values)
    ]
    assert went_on == expected and not all(expected)
    trials = study.trials()
    assert [each.state for each in trials] == ["finished" if each else "pruned" for each in went_on]
    assert [each.short for each in trials] == [{1 / 3: value} for value in values]


def test_a_short_run_counts_once_after_a_kill(opened):
    study = opened(Search(SCORE, num_rungs=2))
    study.queue(JOBS)
    trial = study.take()
    study.goes_on(trial, 0, 0.5)
    study.put_back(trial)
    again = study.take()
    assert again.short == {1 / 3: 0.5} and study.goes_on(again, 0, 0.5)


def test_a_study_of_another_recipe_is_refused_with_what_differs(opened):
    opened(same={"training.num_steps": 60, "teacher.path": "t"})
    with pytest.raises(InputError) as refused:
        opened(same={"training.num_steps": 100, "teacher.path": "t"})
    assert str(refused.value).startswith("--study: 's' in 'memory' is a search with training.num_steps=60, and")
    assert "this one has 100; give another --study" in str(refused.value)
    with pytest.raises(InputError, match=r"with teacher.path='t', and this one has None"):
        opened(same={"training.num_steps": 60})
    with pytest.raises(InputError, match=r"with training.seed=None, and this one has 1; give another --study"):
        opened(same={"training.num_steps": 60, "teacher.path": "t", "training.seed": 1})
    opened(same={"training.num_steps": 100, "teacher.path": "t"}, name="another")


@pytest.mark.parametrize(
    "url, reason",
    [
        ("no url", "Could not parse"),
        ("sqlite:////no/such/folder/study.db", "unable to open database file"),
        ("mysql://me:secret@localhost/db", "No module named"),
        ("what://me:secret@localhost/db", "Can't load plugin"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_one_line_without_the_password(tmp_path, url, reason):
    with pytest.raises(InputError) as refused:
        Study(url, "s", Search(SCORE), {}, tmp_path)
    message = str(refused.value)
    assert message.startswith("--storage: ") and reason in message and "postgresql://USER@HOST/NAME" in message
    assert "\n" not in message and "secret" not in message


def test_a_storage_that_goes_away_is_one_line(opened):
    words = r"^--storage: gone; when it is there again, the same command goes on"
    with pytest.raises(InputError, match=words), opened():
        raise optuna.exceptions.StorageInternalError("gone")


def test_the_recipe_of_a_study_holds_what_its_options_are(tmp_path):
    """`open_study`: other bounds, another metric or line are another search."""
    from abkd.tune.folder import open_study

    recipe = recipe_of(run_dir=str(tmp_path / "search"))
    url = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    with open_study(recipe, Search(SCORE), url, "x") as study:
        assert study.folder == tmp_path / "search"
    with open_study(recipe, Search(SCORE, "tpe", num_trials=7, num_finalists=1), url, "x"):
        pass
    for search, option in [
        (Search(Metric("other", True)), "--metric='score', and this one has 'other'"),
        (Search(SCORE, plane=Plane(line=Line("alpha", 1))), "--line=None, and this one has 'alpha=1'"),
        (Search(SCORE, num_rungs=2), "--rungs=1, and this one has 2"),
        (Search(SCORE, rates=(1e-4,)), "training.learning_rate=0.001, and this one has None"),
    ]:
        with pytest.raises(InputError) as refused:
            open_study(recipe, search, url, "x")
        assert option in str(refused.value)
