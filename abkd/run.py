"""A recipe becomes objects, the objects train, and the folder of the run says what came out."""

import os
import shutil
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError
from torch import nn

from abkd.analysis.report import REPORT, report_after
from abkd.callbacks import MetricsWriter, ProgressBar, StopOnInterrupt, ValidateLast, Watch, quiet
from abkd.card import CARD
from abkd.config import Recipe
from abkd.engine import check_engine, describe
from abkd.errors import InputError, ServerLost
from abkd.ranks import num_ranks, on_all, on_first
from abkd.rundir import EVALUATION, RESULTS, RunDir
from abkd.setup import Say
from abkd.tasks import task_of
from abkd.trainer import AbstractDistillationTrainer

BEFORE = "before.json"


def train(recipe: Recipe, inputs: Any, say: Say) -> dict[str, Any] | None:
    """The whole run: load, measure, train, save, measure. Its results, or None if it was interrupted.

    Args:
        recipe: a checked recipe.
        inputs: `check_inputs(recipe)`.
        say: prints one line.
    """
    if recipe.resume and (results := RunDir(Path(recipe.run_dir)).read_results()):
        say(f"{recipe.run_dir} is finished already")
        return results
    check_engine(recipe.training)
    say(describe(recipe.training))
    task = task_of(recipe)
    setup = on_all(lambda: task.prepare(recipe, inputs, say, to_train=True))
    student = on_all(lambda: task.make_student(recipe, setup, say))
    try:
        return distil(recipe, setup, student, say)
    except ServerLost as error:
        raise ServerLost(f"{error}, then go on with: {RunDir(Path(recipe.run_dir)).how_to_go_on}") from error


def distil(
    recipe: Recipe,
    setup: Any,
    student: nn.Module,
    say: Say,
    measured: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Trains `student` in place under the recipe; writes the run's folder.

    Args:
        setup: what the task's `prepare` made of the recipe.
        measured: results of `teacher` and `before`, where they are known already.

    Returns:
        The content of results.json (`training_s` is None for a resumed run); None if it was interrupted.
    """
    run_dir, task = RunDir(Path(recipe.run_dir)), task_of(recipe)
    on_first(lambda: _open(recipe, run_dir, student))
    stop, bar = StopOnInterrupt(say), ProgressBar(run_dir.path.name)
    last = [ValidateLast()] if recipe.training.chooses_best else []
    callbacks = [MetricsWriter(run_dir.log), stop, bar, Watch(say, run_dir.log), *last]
    trainer = on_all(lambda: task.make_trainer(recipe, setup, student, run_dir, callbacks))
    quiet(trainer)
    if trainer.how_logits:
        say(trainer.how_logits)
    task.place(recipe, setup, student, trainer.args.device)
    keep = run_dir.path / EVALUATION
    known = measured or on_first(lambda: run_dir.read_json(BEFORE))
    measured = known or task.measure_before(recipe, setup, student, keep)
    on_first(lambda: run_dir.write_json(BEFORE, measured))
    started = time.monotonic()
    if trained := on_first(lambda: _trained_weights(run_dir)):
        student = on_all(lambda: task.load_trained(student, trained))
    else:
        with stop, bar:
            _train_from_last_checkpoint(trainer, run_dir, say)
        if stop.interrupted or trainer.state.global_step < trainer.state.max_steps:
            return None
    seconds = time.monotonic() - started
    student = task.trained(recipe, student)
    if not on_first(run_dir.student.exists):
        _save_student(task, student, trainer, run_dir)
    results = measured | {
        "after": task.measure(recipe, setup, student, keep / "after"),
        "calibration": str(trainer.objective.calibration) if trainer.objective.kd_weight > 0 else None,
        "divergence": str(trainer.objective.divergence) if trainer.objective.kd_weight > 0 else None,
        "num_steps": run_dir.last_step(),
        "selected_on": recipe.training.selected_on,
        "student_step": run_dir.best_step() or run_dir.last_step(),
        "training_s": None if recipe.resume else round(seconds, 1),
    }
    on_first(lambda: _close(recipe, run_dir, results))
    on_first(lambda: report_after([run_dir.path], run_dir.path / REPORT, say))
    return results


def _open(recipe: Recipe, run_dir: RunDir, student: nn.Module) -> None:
    adapted = task_of(recipe).is_adapted(student)
    _check_disk(run_dir, student, adapted, num_checkpoints=3 if recipe.training.chooses_best else 2)
    if recipe.resume:
        run_dir.drop_torn_checkpoints()
    else:
        run_dir.create(recipe.to_yaml())


def _close(recipe: Recipe, run_dir: RunDir, results: dict[str, Any]) -> None:
    (run_dir.student / CARD).write_text(task_of(recipe).model_card(recipe, results), encoding="utf-8")
    run_dir.write_json(RESULTS, results)


def _trained_weights(run_dir: RunDir) -> Path | None:
    """The folder of a student that has had all its steps, if the run got that far."""
    if run_dir.student.exists():
        return run_dir.student
    state = run_dir.trainer_state()
    if state is None or state["global_step"] < state["max_steps"]:
        return None
    return run_dir.checkpoint(run_dir.best_step() or state["global_step"])  # the Trainer would take one step too many


def _train_from_last_checkpoint(trainer: AbstractDistillationTrainer, run_dir: RunDir, say: Say) -> None:
    whole = on_first(run_dir.whole_checkpoints)
    on_first(lambda: run_dir.drop_metrics_after(int(whole[-1].name.rpartition("-")[2]) if whole else -1))
    if whole:
        say(f"going on from {whole[-1]}")
    try:
        trainer.train(resume_from_checkpoint=str(whole[-1]) if whole else None)
    except ServerLost:
        step = trainer.state.global_step
        if num_ranks() == 1 and step and not run_dir.checkpoint(step).exists():  # of several the others are in the step
            trainer.keep_step()
        raise


def _save_student(task: ModuleType, student: nn.Module, trainer: AbstractDistillationTrainer, run_dir: RunDir) -> None:
    """Written aside and renamed: the folder `student` is whole or absent."""
    part = run_dir.path / ".student.part"
    write = task.save_student(student, trainer, part)

    def replace() -> None:
        shutil.rmtree(part, ignore_errors=True)
        try:
            write()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(part, ignore_errors=True)
            raise InputError(
                f"run_dir: the student cannot be written to {str(run_dir.path)!r} ({error}); "
                "free some disk, then go on with resume=true"
            ) from error
        os.replace(part, run_dir.student)

    on_first(replace)


def _check_disk(run_dir: RunDir, student: nn.Module, is_adapted: bool, num_checkpoints: int) -> None:
    """Room for the student, and for checkpoints of its weights, or its adapter alone, and of Adam's two moments."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in student.parameters())
    trained = 4 * sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    needed = weights + num_checkpoints * ((trained if is_adapted else weights) + 2 * trained)
    existing = next(folder for folder in [run_dir.path, *run_dir.path.absolute().parents] if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"run_dir: {str(run_dir.path)!r} needs {needed / 2**30:.2f} GiB for the student and {num_checkpoints} "
            f"checkpoints, {free / 2**30:.2f} GiB are free; free some, or give another folder with run_dir=PATH"
        )
