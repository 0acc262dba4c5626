"""Trained students side by side, beside their teacher and what they were before."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from abkd.config import Recipe
from abkd.rundir import EVALUATION
from abkd.setup import Say
from abkd.tasks import task_of


class Target(NamedTuple):
    recipe: Recipe
    """Its student is the model to be measured."""
    before: Recipe
    """Its student is what the model was before training."""
    folder: Path | None
    """Of the run, whose answers are kept there; None for a model that is no run."""


def evaluate(targets: Mapping[str, Target], inputs: Any, say: Say) -> dict[str, Any]:
    """Measures of the teacher, of each different student before training, and of every target, in this order.

    Args:
        targets: by name, of one teacher, one data set and one protocol, which are those of `inputs`. A lone one is
            called `student`.
    """
    first = next(iter(targets.values()))
    task = task_of(first.recipe)
    setup = task.prepare(first.recipe, inputs, say)
    measured: dict[str, Any] = {}
    if (teacher := task.teacher_model(setup)) is not None:
        measured["teacher"] = task.measure(first.recipe, setup, teacher, _keep(first, "teacher"))
    before: dict[str, str] = {}
    for name, target in targets.items():
        student = target.before.student.model_dump_json()
        if student not in before:
            before[student] = name
            measured[f"before {name}"] = _measure(target, target.before, setup, "before", say)
    if len(before) == 1:
        measured = {("before" if name.startswith("before ") else name): row for name, row in measured.items()}
    for name, target in targets.items():
        shown = name if len(targets) > 1 else "student"
        measured[shown] = _measure(target, target.recipe, setup, "after", say)
    return measured


def _measure(target: Target, recipe: Recipe, setup: Any, name: str, say: Say) -> dict[str, Any]:
    student = target.recipe.student
    trained = getattr(student, "prompts", "") or student.path  # of CLIP the path is not what was trained
    say(f"measuring {trained if name == 'after' else 'the student before training'}")
    task = task_of(recipe)
    return task.measure(target.recipe, setup, task.make_student(recipe, setup, say), _keep(target, name))


def _keep(target: Target, name: str) -> Path | None:
    return target.folder and target.folder / EVALUATION / name
