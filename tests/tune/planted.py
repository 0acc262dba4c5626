"""What stands for storages and trainings in the tests of the search: both in memory."""

from types import SimpleNamespace

from optuna.storages import InMemoryStorage
from sqlalchemy.pool import QueuePool

from abkd.tune import study as study_module
from abkd.tune.study import Study


def open_in_memory(monkeypatch, folder, search, same=None, name="s"):
    """A study in a SQLite database that studies of one folder share, and that lasts as long as one of them is open."""
    monkeypatch.setattr(study_module, "_engine_options", lambda url: {"poolclass": QueuePool})
    return Study(f"sqlite:///file:{folder}?mode=memory&cache=shared&uri=true", name, search, same or {"s": 0}, folder)


def use_plain_memory(monkeypatch):
    """From now on every study is in one storage without a database, which is quicker."""
    storage = InMemoryStorage()
    storage.engine = SimpleNamespace(dispose=lambda: None)
    monkeypatch.setattr(study_module, "RDBStorage", lambda url, engine_kwargs: storage)


class Planted:
    """Trains nothing: the score of a point is given; the folder has a student, as that of a run.

    Args:
        score: of (point, seed, share); an exception is raised, None is an interruption.
    """

    def __init__(self, folder, score):
        self.folder, self.score, self.calls = folder, score, []

    def __call__(self, name, point, *, seed, share):
        self.calls.append((name, point, seed))
        score = self.score(point, seed, share)
        if isinstance(score, BaseException):
            raise score
        if score is None:
            return None
        (self.folder / name / "student").mkdir(parents=True)
        return {"after": {"score": score, "answers": ["x"], "count": 3}}
