"""The runs behind the trials: ordinary ones, which share teacher, data, and the measures before training."""

import copy
import gc
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from abkd.config import ImageRecipe, Recipe
from abkd.engine import check_engine, describe
from abkd.errors import InputError, ServerLost
from abkd.run import BEFORE, distil
from abkd.rundir import ENVIRONMENT, RECIPE, RunDir
from abkd.tasks import task_of
from abkd.tune.points import Point, at
from abkd.tune.study import locked

_LOST = ("the loss is ", "the gradient is ")
"""How the trainer begins where the weights are lost; what recipe or machine are to blame for names a field."""


class Diverged(Exception):
    """The training of a point came to a loss that is not finite; the message is the trainer's."""


class Runs:
    """Trains a recipe at points of the plane. Models and data are loaded for the first training, and kept.

    Args:
        recipe: checked; its run_dir is the search's folder.
        inputs: `check_inputs(recipe)`.
        say: prints one line; a line that comes with every run is said once.
    """

    def __init__(self, recipe: Recipe, inputs: Any, say: Callable[[str], None]):
        self.recipe, self.inputs, self.task = recipe, inputs, task_of(recipe)
        self.folder = RunDir(Path(recipe.run_dir))
        self._say, self._said = say, set[str]()
        self._setup: Any = None
        self._start: tuple[int, nn.Module] | None = None

    def __call__(self, name: str, point: Point, *, seed: int | None, share: float) -> dict[str, Any] | None:
        """Trains in the folder `name`; goes on with what is begun there, and reads what is finished.

        Args:
            seed: of the training; None is the recipe's own.
            share: of the recipe's training.

        Returns:
            The run's results; None if it was interrupted.

        Raises:
            Diverged: the loss or its gradient came to be infinite or NaN.
            InputError: whatever else a run refuses.
        """
        run_dir = RunDir(self.folder.path / name)
        recipe = at(self.recipe, point, run_dir=run_dir.path, seed=seed, share=share)
        if _is_begun(recipe, run_dir):
            if results := run_dir.read_results():
                return results
            recipe = recipe.model_copy(update={"resume": True})
        results = self._train(recipe, run_dir)
        if results is not None:
            shutil.rmtree(run_dir.checkpoints, ignore_errors=True)
        return results

    def _train(self, recipe: Recipe, run_dir: RunDir) -> dict[str, Any] | None:
        setup, start = self._prepared(), self._start_of(recipe)
        before = f"before-{_digest(start)}.json"  # other seeds may start from other weights
        known = self.folder.read_json(before)
        try:
            results = distil(recipe, setup, copy.deepcopy(start), self._say_once, known)
        except ServerLost as error:
            raise ServerLost(f"{error}, then go on with the same command") from error
        except InputError as error:
            if not str(error).startswith(_LOST):
                raise
            shutil.rmtree(run_dir.checkpoints, ignore_errors=True)
            raise Diverged(str(error)) from None
        gc.collect()  # the trainer and its student refer to each other
        if known is None and (measured := run_dir.read_json(BEFORE)):
            with locked(self.folder.path):
                self.folder.write_json(before, measured)
        return results

    def _prepared(self) -> Any:
        """The task's setup; an image classifier is measured on the images set aside, if there are any."""
        if self._setup is None:
            check_engine(self.recipe.training)
            self._say(describe(self.recipe.training))
            self._setup = self.task.prepare(self.recipe, self.inputs, self._say, to_train=True)
            if isinstance(self.recipe, ImageRecipe):
                self._setup = _on_validation(self._setup, self._say)
        return self._setup

    def _start_of(self, recipe: Recipe) -> nn.Module:
        """The student before training, under the recipe's seed."""
        seed = recipe.training.seed
        if self._start is None or self._start[0] != seed:
            self._start = None  # room for the new one
            self._start = seed, self.task.make_student(recipe, self._prepared(), self._say_once)
        return self._start[1]

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)


def _is_begun(recipe: Recipe, run_dir: RunDir) -> bool:
    """Whether the folder holds this very run; what a kill left before anything was trained is removed."""
    if not run_dir.path.exists():
        return False
    if {file.name for file in run_dir.path.iterdir()} <= {RECIPE, f".{ENVIRONMENT}.part"}:
        shutil.rmtree(run_dir.path)
        return False
    file = run_dir.path / RECIPE
    if not file.exists() or file.read_text(encoding="utf-8") != recipe.to_yaml():
        raise InputError(
            f"run_dir: {str(run_dir.path)!r} holds a run of another recipe; move it away, or give another run_dir"
        )
    return True


def _digest(model: nn.Module) -> str:
    """Of the names and values of all weights."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:12]


def _on_validation(setup: Any, say: Callable[[str], None]) -> Any:
    """With the images set aside in the place of the test images, which a search must not look at."""
    if setup.validation is None:
        say("the search goes by the test images, which flatters what it finds; set data.num_validation above 0")
        return setup
    say(f"the search goes by the {len(setup.validation):,} images set aside, not by the test images")
    return replace(setup, test=setup.validation)
