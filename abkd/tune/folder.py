"""The folder of a search, its inputs and its study: checked and opened before torch is imported.

study.db          Optuna's study, unless --storage names another place
trials/NNN/       the run of a trial with the whole training
short/NNN-1ofM/   its run with one M-th of the training
tune.json         the trials and what they say
best.yaml         the recipe at the recommended point
"""

import os
import shutil
from pathlib import Path
from typing import Any

from abkd import inputs
from abkd.config import Recipe
from abkd.errors import InputError
from abkd.tune.options import Search
from abkd.tune.points import fixed
from abkd.tune.study import LOCK, Study


def check_inputs(recipe: Recipe) -> Any:
    """`abkd.inputs.check_inputs`, for a folder that is new or holds a search, which other processes may be busy with.

    Raises:
        InputError: also where the folder holds anything else.
    """
    folder = Path(recipe.run_dir)
    if folder.exists() and any(folder.iterdir()) and not (folder / LOCK).exists():
        raise InputError(f"run_dir: {str(folder)!r} exists and holds no search; give another with run_dir=PATH")
    beside = folder.with_name(f".{folder.name}-{os.getpid()}")
    return inputs.check_inputs(recipe.model_copy(update={"run_dir": str(beside)}))


def open_study(recipe: Recipe, search: Search, url: str | None, name: str | None) -> Study:
    """The search's study, made with its folder if there is none; a folder that was made for nothing is removed.

    Args:
        url: None is a SQLite file in the folder.
        name: None is the folder's own.

    Raises:
        InputError: as `Study`.
    """
    folder = Path(recipe.run_dir)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    plane = search.plane
    same = fixed(recipe, without_rate=bool(search.rates)) | {
        "--metric": search.metric.name,
        "--alpha": str(plane.alpha),
        "--beta": str(plane.beta),
        "--line": plane.line and str(plane.line),
        "--rungs": search.num_rungs,
        "--search-rate": list(search.rates),
    }
    url = url or f"sqlite:///{(folder / 'study.db').absolute()}"
    try:
        return Study(url, name or folder.name, search, same, folder)
    except InputError:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
