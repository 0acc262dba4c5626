"""The Optuna study of a search: a queue of trials that processes and machines share. The only file with optuna."""

import fcntl
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from abkd.errors import InputError
from abkd.processes import is_gone, this_process
from abkd.tune.options import REDUCTION, Search
from abkd.tune.points import Point

STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
LOCK = "study.lock"
RATE = "learning_rate"


@dataclass(frozen=True)
class Job:
    """What is queued: a point, or one to be drawn."""

    key: str
    """No two jobs of a queue have the same."""
    point: Point | None = None
    seed: int | None = None
    """Of a finalist's training; None is the recipe's own, under which the search goes."""


@dataclass(frozen=True)
class Trial:
    """A trial as the study has it."""

    number: int
    state: str
    """One of `STATES`."""
    point: Point | None
    """None for one that is not drawn yet."""
    seed: int | None
    """As of its job: None for the search's, a number for a finalist's."""
    value: float | None
    """The metric after the training; of a pruned one after its last short run."""
    short: dict[float, float]
    """Share of the training -> the metric after so short a run."""
    noted: dict[str, Any]
    """What `Study.note` was given: measures, seconds, error."""


class Study:
    """Trials of one recipe in Optuna's storage, each taken by one process at a time.

    Args:
        url: of the storage, as SQLAlchemy has it.
        name: of the study there, made if there is none.
        same: what all its trials share, flat; a study of anything else is refused.
        folder: for a lock that the processes of one machine share.

    Raises:
        InputError: the storage cannot be opened, or the study is another search's.
    """

    def __init__(self, url: str, name: str, search: Search, same: Mapping[str, Any], folder: Path):
        self.search, self.name, self.folder = search, name, folder
        self._taken: dict[int, optuna.Trial] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with locked(self.folder), _one_line(url):
            self._storage = RDBStorage(url, engine_kwargs=_engine_options(url))
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=name,
                direction="maximize" if search.metric.greater_is_better else "minimize",
                pruner=SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION),
                load_if_exists=True,
            )
            self._id = self._storage.get_study_id_from_name(name)
            if "fixed" not in self._study.user_attrs:
                self._study.set_user_attr("fixed", dict(same))
            try:
                self._check_same(url, same)
            except InputError:
                self.close()
                raise

    def _check_same(self, url: str, same: Mapping[str, Any]) -> None:
        theirs = self._study.user_attrs["fixed"]
        for key in dict.fromkeys([*theirs, *same]):
            if theirs.get(key) != same.get(key):
                raise InputError(
                    f"--study: {self.name!r} in {_shown(url)} is a search with {key}={theirs.get(key)!r}, and this "
                    f"one has {same.get(key)!r}; give another --study, or another run_dir"
                )

    def close(self) -> None:
        self._storage.remove_session()
        self._storage.engine.dispose()

    def __enter__(self) -> "Study":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """A storage that has gone away is told in one line; what was trained is in its folders."""
        self.close()
        if isinstance(error, SQLAlchemyError | optuna.exceptions.StorageInternalError):
            raise InputError(f"--storage: {_reason(error)}; when it is there again, the same command goes on") from None

    def trials(self) -> list[Trial]:
        """In the order in which they were queued."""
        return [self._read(each) for each in self._queued()]

    def _queued(self) -> list[FrozenTrial]:
        """Optuna's own trials, without those that were passed over."""
        found = self._study.get_trials(deepcopy=False)
        return [each for each in found if "key" in each.user_attrs and "passed_over" not in each.user_attrs]

    def _read(self, trial: FrozenTrial) -> Trial:
        noted = dict(trial.user_attrs)
        point = noted.pop("point", None)
        return Trial(
            trial.number,
            STATES[trial.state],
            None if point is None else Point(*point),
            noted.pop("seed"),
            trial.value if trial.state.is_finished() else None,
            {self.search.share_after(step): value for step, value in trial.intermediate_values.items()},
            noted,
        )

    # The queue

    def queue(self, jobs: Iterable[Job]) -> None:
        """Adds those that are not there yet."""
        with locked(self.folder):
            known = {each.user_attrs["key"] for each in self._queued()}
            for job in jobs:
                if job.key not in known:
                    params = {} if job.point is None else self._params(job.point)
                    self._study.enqueue_trial(params, {"key": job.key, "seed": job.seed})

    def take(self) -> Trial | None:
        """The next trial that waits, from now on this process's; None where none does."""
        with locked(self.folder):
            while waiting := next((each for each in self._queued() if each.state == TrialState.WAITING), None):
                self._study.sampler = self._sampler(waiting.number)
                trial = self._study.ask()
                queued = {each.number: each for each in self._queued()}
                if trial.number not in queued or _is_repeated(queued[trial.number], queued.values()):
                    # a machine without this lock took the last one, or queued the same at the same moment
                    trial.set_user_attr("passed_over", True)
                    self._study.tell(trial, state=TrialState.FAIL)
                    continue
                owner, point = this_process(), self._draw(trial)
                trial.set_user_attr("owner", owner)
                trial.set_user_attr("point", point)
                self._taken[trial.number] = trial
                return replace(self._read(queued[trial.number]), point=point, noted={"owner": owner})
        return None

    def _params(self, point: Point) -> dict[str, float]:
        rate = {} if point.learning_rate is None else {RATE: point.learning_rate}
        return self.search.plane.drawn(point.alpha, point.beta) | rate

    def _draw(self, trial: optuna.Trial) -> Point:
        drawn = {name: trial.suggest_float(name, each.low, each.high) for name, each in self.search.plane.free.items()}
        rate = trial.suggest_categorical(RATE, self.search.rates) if self.search.rates else None
        return Point(*self.search.plane.point(drawn), rate)

    def _sampler(self, number: int) -> BaseSampler:
        """Seeded by the trial's number: a draw depends on the study alone, not on what its process drew before."""
        seed = random.Random(f"{self.search.seed}/{number}").getrandbits(32)
        return TPESampler(seed=seed) if self.search.sampler == "tpe" else RandomSampler(seed=seed)

    def put_back(self, trial: Trial) -> None:
        """It waits again, with its number and its point."""
        self._taken.pop(trial.number, None)
        self._storage.set_trial_state_values(self._id_of(trial.number), TrialState.WAITING)

    def put_back_abandoned(self, even_elsewhere: bool = False) -> list[Trial]:
        """Trials whose process on this machine is gone wait again; where it is asked for, other machines' too."""
        with locked(self.folder):
            found = [
                each for each in self.running_elsewhere() if even_elsewhere or is_gone(each.noted.get("owner", {}))
            ]
            for trial in found:
                self.put_back(trial)
        return found

    def running_elsewhere(self) -> list[Trial]:
        """Trials that another process has taken."""
        return [each for each in self.trials() if each.state == "running" and each.number not in self._taken]

    def _id_of(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, number)

    # A trial that this process has taken

    def note(self, trial: Trial, **what: Any) -> None:
        """Keeps numbers, texts, and lists and dicts of them."""
        for name, value in what.items():
            self._taken[trial.number].set_user_attr(name, value)

    def goes_on(self, trial: Trial, rung: int, value: float) -> bool:
        """Whether a point whose short run came to `value` is among the best third of those that got so far."""
        ours, step = self._taken[trial.number], REDUCTION**rung
        if self.search.share_after(step) not in trial.short:  # else it was reported before this process took it
            ours.report(value, step)
        return not ours.should_prune()

    def finish(self, trial: Trial, value: float) -> None:
        self._study.tell(self._taken.pop(trial.number), value)

    def prune(self, trial: Trial) -> None:
        self._study.tell(self._taken.pop(trial.number), state=TrialState.PRUNED)

    def fail(self, trial: Trial, error: str) -> None:
        self.note(trial, error=error)
        self._study.tell(self._taken.pop(trial.number), state=TrialState.FAIL)


def _is_repeated(trial: FrozenTrial, queued: Iterable[FrozenTrial]) -> bool:
    """Whether an earlier trial is of the same job."""
    same = [each.number for each in queued if each.user_attrs["key"] == trial.user_attrs["key"]]
    return min(same) < trial.number


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process of the folder at a time: SQLite would let two take the same trial, which a server does not."""
    with (folder / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel lets go of a killed process's lock
        yield


def _engine_options(url: str) -> dict[str, Any]:
    """A SQLite file is waited for as long as a process may hold it."""
    return {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}


@contextmanager
def _one_line(url: str) -> Iterator[None]:
    """What opening a storage fails with, in one line."""
    try:
        yield
    except (SQLAlchemyError, ImportError, RuntimeError, optuna.exceptions.OptunaError) as error:
        raise InputError(
            f"--storage: {_shown(url)} cannot be opened ({_reason(error)}); give the URL of a database, as "
            "sqlite:///FILE.db or postgresql://USER@HOST/NAME"
        ) from None


def _reason(error: BaseException) -> str:
    return (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]


def _shown(url: str) -> str:
    """Without the password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return repr(url)
