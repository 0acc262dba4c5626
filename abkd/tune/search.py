"""The search: trials off the queue, short runs first, finalists again under other seeds, a recommended point."""

import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from abkd.config import Recipe
from abkd.errors import InputError
from abkd.rundir import RunDir
from abkd.tune.options import Search
from abkd.tune.points import Point, at
from abkd.tune.runs import Diverged
from abkd.tune.study import Job, Study, Trial, locked
from abkd.tune.summary import as_json, conclude, finalists, lines

TUNE, BEST = "tune.json", "best.yaml"
WAIT_S = 5.0
"""Between two looks at what other processes are busy with."""
Say = Callable[[str], None]


class Train(Protocol):
    """`abkd.tune.runs.Runs`, or what stands for it."""

    def __call__(self, name: str, point: Point, *, seed: int | None, share: float) -> dict[str, Any] | None: ...


def tune(recipe: Recipe, study: Study, train: Train, say: Say, take_over: bool = False) -> bool:
    """Works the study's queue off, with any other processes that do; writes tune.json and best.yaml.

    Args:
        recipe: its run_dir is the search's folder.
        train: trains at a point and gives the run's results; None where it was interrupted.
        take_over: trials that other machines have left running are repeated.

    Returns:
        False if it was interrupted; the same call goes on.

    Raises:
        InputError: no training came to an end.
    """
    search = study.search
    for trial in study.put_back_abandoned(even_elsewhere=take_over):
        say(f"trial {trial.number} was left running; it goes on")
    study.queue(_search_jobs(study))
    again = f", then the best {search.num_finalists} again under {search.num_seeds} seeds" * bool(search.num_finalists)
    say(f"searching {sum(each.seed is None for each in study.trials())} points for {search.metric.name}{again}")
    if not _work_off(recipe, study, train, say):
        return False
    study.queue(_repeats(recipe, study))
    if not _work_off(recipe, study, train, say):
        return False
    _close(recipe, study, say)
    return True


def _search_jobs(study: Study) -> Iterable[Job]:
    points = study.search.points
    if points is None:
        return [Job(f"draw {number}") for number in range(study.search.num_trials)]
    return [Job(str(point), point) for point in points]


def _repeats(recipe: Recipe, study: Study) -> Iterable[Job]:
    """Seed by seed, so that a process keeps one start."""
    first = recipe.training.seed + 1
    best = finalists(study.search, study.trials())
    seeds = range(first, first + study.search.num_seeds)
    return [Job(f"{point} seed={seed}", point, seed) for seed in seeds for point in best]


def _work_off(recipe: Recipe, study: Study, train: Train, say: Say) -> bool:
    """Until no trial waits or runs anywhere. False if it was interrupted."""
    waited_for: set[int] = set()
    while True:
        if (trial := study.take()) is not None:
            if not _conduct(study, trial, train):
                return False
            _keep_up(recipe, study, trial.number, say)
            continue
        if not (others := study.running_elsewhere()):
            return True
        for other in others:
            if other.number not in waited_for:
                host = other.noted.get("owner", {}).get("host", "another machine")
                say(f"waiting for trial {other.number} on {host}; if nothing runs there, start again with --take-over")
        waited_for |= {other.number for other in others}
        time.sleep(WAIT_S)
        study.put_back_abandoned()


def _conduct(study: Study, trial: Trial, train: Train) -> bool:
    """Trains what the trial asks for and tells the study. False if it was interrupted; then the trial waits again."""
    started = time.monotonic()
    assert trial.point is not None
    try:
        for rung, share in enumerate(study.search.shares if trial.seed is None else [1.0]):
            name = run_name(trial.number, share)
            results = train(name, trial.point, seed=trial.seed, share=share)
            if results is None:
                study.put_back(trial)
                return False
            value = study.search.metric.of(results)
            if not math.isfinite(value):
                raise Diverged(f"{study.search.metric.name} is {value}")
            study.note(trial, run=name, seconds=round(time.monotonic() - started, 1))
            if share == 1:
                study.note(trial, measures=_numbers(results["after"]))
                study.finish(trial, value)
            elif not study.goes_on(trial, rung, value):
                study.prune(trial)
                break
    except Diverged as error:
        study.fail(trial, str(error))
    except BaseException:  # a full disk, Ctrl-C, a defect: not the point's doing
        study.put_back(trial)
        raise
    return True


def run_name(number: int, share: float) -> str:
    """Of a trial's run: trials/NNN, and short/NNN-1of9 of one with a ninth of the training."""
    return f"trials/{number:03d}" if share == 1 else f"short/{number:03d}-1of{round(1 / share)}"


def _numbers(measured: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in measured.items() if type(value) in (int, float)}


def _progress(search: Search, trials: Sequence[Trial], number: int) -> str:
    trial = next(each for each in trials if each.number == number)
    num_done = sum(each.state not in ("waiting", "running") for each in trials)
    seed = "" if trial.seed is None else f" seed={trial.seed}"
    said = f"trial {number} ({num_done} of {len(trials)}): {trial.point}{seed}: "
    if trial.state == "failed":
        return f"{said}failed, {trial.noted['error']}"
    said += f"{search.metric.name} {trial.value:.4f}, {trial.noted['seconds']:.0f} s"
    if trial.state == "pruned":
        return f"{said}, pruned after a short run"
    found = conclude(search, trials)
    return said if found is None else f"{said}; best {fmean(found.values[found.best]):.4f} at {found.best}"


def _keep_up(recipe: Recipe, study: Study, number: int, say: Say) -> None:
    """After a trial: a line, tune.json, and no more students than may be wanted."""
    search, trials, folder = study.search, study.trials(), RunDir(Path(recipe.run_dir))
    say(_progress(search, trials, number))
    with locked(folder.path):
        folder.write_json(TUNE, as_json(search, trials))
    _drop_students(search, trials, folder, finalists(search, trials))


def _drop_students(search: Search, trials: Sequence[Trial], folder: RunDir, kept: Sequence[Point]) -> None:
    """Of short runs, and of points not to be kept."""
    if search.keep_students:
        return
    for trial in trials:
        for share in search.shares if trial.state in ("finished", "pruned") else ():
            if share < 1 or trial.point not in kept:
                shutil.rmtree(RunDir(folder.path / run_name(trial.number, share)).student, ignore_errors=True)


def _close(recipe: Recipe, study: Study, say: Say) -> None:
    """tune.json, best.yaml, and the table."""
    search, trials, folder = study.search, study.trials(), RunDir(Path(recipe.run_dir))
    found = conclude(search, trials)
    if found is None:
        errors = [each.noted["error"] for each in trials if each.state == "failed"]
        raise InputError(f"tune: no training came to an end, the first for: {errors[0]}")
    best = at(recipe, found.best, run_dir=folder.path / "best")
    with locked(folder.path):
        folder.write_json(TUNE, as_json(search, trials))
        header = f"# {found.best}, by {search.metric.name}\n"
        (folder.path / BEST).write_text(header + best.to_yaml(), encoding="utf-8")
    _drop_students(search, trials, folder, [found.best])
    for line in lines(search, trials):
        say(line)
    say(f"the figures are in {folder.path / TUNE}; train at the recommended point by: abkd train {folder.path / BEST}")
