"""A recipe becomes objects, the objects train, and the folder of the run says what came out."""

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from abkd import config
from abkd.callbacks import MetricsWriter, ProgressBar, StopOnInterrupt, Watch, quiet
from abkd.data.corpus import Corpus
from abkd.errors import InputError
from abkd.inputs import Inputs
from abkd.measures import measure, measure_before
from abkd.models.pretrained import load_model
from abkd.parts import make_objective, make_rollouts
from abkd.rundir import EVALUATION, RESULTS, RunDir
from abkd.setup import Say, Setup, make_student, prepare
from abkd.trainer import DistillationTrainer

BEFORE = "before.json"


def train(recipe: config.Recipe, inputs: Inputs, say: Say) -> dict[str, Any] | None:
    """The whole run: load, measure, train, save, measure. Its results, or None if it was interrupted.

    Args:
        recipe: a checked recipe.
        inputs: `check_inputs(recipe)`.
        say: prints one line.
    """
    if recipe.resume and (results := RunDir(Path(recipe.run_dir)).read_results()):
        say(f"{recipe.run_dir} is finished already")
        return results
    setup = prepare(recipe, inputs, say, to_train=True)
    return distil(recipe, setup, make_student(recipe, setup, say), say)


def make_trainer(
    recipe: config.Recipe, setup: Setup, student: PreTrainedModel, run_dir: RunDir, callbacks: Sequence[Any] = ()
) -> DistillationTrainer:
    options = recipe.training
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run_dir.path / "tensorboard")
    schedule = "constant_with_warmup" if options.schedule == "constant" else options.schedule
    try:
        arguments = TrainingArguments(
            output_dir=str(run_dir.checkpoints),
            max_steps=options.num_steps or -1,
            num_train_epochs=options.num_epochs,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=recipe.evaluation.batch_size,
            gradient_accumulation_steps=options.accumulation,
            learning_rate=options.learning_rate,
            lr_scheduler_type=schedule,
            warmup_steps=options.warmup_steps,
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
            bf16=options.precision == "bf16",
            gradient_checkpointing=options.activation_checkpointing,
            use_cpu=options.device == "cpu",
            seed=options.seed,
            logging_steps=options.log_every,
            eval_strategy="steps" if options.validate_every else "no",
            eval_steps=options.validate_every or None,
            save_strategy="steps" if options.save_every else "no",
            save_steps=options.save_every or 1,
            save_total_limit=2,
            report_to=list(options.report_to) or "none",
            disable_tqdm=True,
        )
    except ValueError as error:
        raise InputError(f"training: {error}") from error
    trainer = DistillationTrainer(
        model=student,
        args=arguments,
        teacher=setup.teacher,
        objective=make_objective(recipe.objective),
        train_examples=setup.train,
        validation_examples=setup.validation,
        tokenizer=setup.tokenizer,
        callbacks=[MetricsWriter(run_dir.log), *callbacks],
        group_by_length=options.group_by_length,
        rollouts=make_rollouts(recipe.rollouts),
        corpus=None if setup.corpus is None else Corpus(setup.corpus, options.seed),
        lm_weight=recipe.objective.lm_weight,
        logits=options.logits,
    )
    quiet(trainer)
    return trainer


def distil(
    recipe: config.Recipe, setup: Setup, student: PreTrainedModel, say: Say, measured: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """Trains `student` in place under the recipe; writes the run's folder.

    Args:
        measured: results of `teacher` and `before`, where they are known already.

    Returns:
        The content of results.json (`training_s` is None for a resumed run); None if it was interrupted.
    """
    run_dir = RunDir(Path(recipe.run_dir))
    _check_disk(run_dir, student)
    if not recipe.resume:
        run_dir.create(recipe.to_yaml())
    stop, bar = StopOnInterrupt(say), ProgressBar(run_dir.path.name)
    trainer = make_trainer(recipe, setup, student, run_dir, [stop, bar, Watch(say, run_dir.log)])
    say(trainer.how_logits)
    if setup.teacher is not None:
        setup.teacher.model.to(trainer.args.device)
    keep = run_dir.path / EVALUATION
    measured = measured or run_dir.read_json(BEFORE) or measure_before(recipe, setup, student, keep)
    run_dir.write_json(BEFORE, measured)
    started = time.monotonic()
    if trained := _trained_weights(run_dir):
        student.load_state_dict(load_model(str(trained), "run_dir").state_dict())
    else:
        with stop, bar:
            _train_from_last_checkpoint(trainer, run_dir, say)
        if trainer.state.global_step < trainer.state.max_steps:
            return None
    seconds = time.monotonic() - started
    if not run_dir.student.exists():
        _save_student(student, setup.tokenizer, run_dir)
    results = measured | {
        "after": measure(recipe, setup, student, keep / "after"),
        "calibration": str(trainer.objective.calibration) if trainer.objective.kd_weight > 0 else None,
        "divergence": str(trainer.objective.divergence) if trainer.objective.kd_weight > 0 else None,
        "num_steps": run_dir.last_step(),
        "training_s": None if recipe.resume else round(seconds, 1),
    }
    run_dir.write_json(RESULTS, results)
    return results


def _trained_weights(run_dir: RunDir) -> Path | None:
    """The folder of a student that has had all its steps, if the run got that far."""
    if run_dir.student.exists():
        return run_dir.student
    for checkpoint in run_dir.whole_checkpoints()[-1:]:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if state["global_step"] >= state["max_steps"]:  # the Trainer would take one step too many
            return checkpoint
    return None


def _train_from_last_checkpoint(trainer: DistillationTrainer, run_dir: RunDir, say: Say) -> None:
    checkpoints = run_dir.whole_checkpoints()
    if not checkpoints:
        run_dir.drop_metrics_after(-1)
        trainer.train()
        return
    say(f"going on from {checkpoints[-1]}")
    run_dir.drop_metrics_after(int(checkpoints[-1].name.rpartition("-")[2]))
    trainer.train(resume_from_checkpoint=str(checkpoints[-1]))


def _save_student(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run_dir: RunDir) -> None:
    """Written aside and renamed: the folder `student` is whole or absent."""
    part = run_dir.path / ".student.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        student.save_pretrained(part)
        tokenizer.save_pretrained(part)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise InputError(
            f"run_dir: the student cannot be written to {str(run_dir.path)!r} ({error}); "
            "free some disk, then go on with resume=true"
        ) from error
    os.replace(part, run_dir.student)


def _check_disk(run_dir: RunDir, student: PreTrainedModel) -> None:
    """Room for the student and for two checkpoints of weights and Adam's two moments."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in student.parameters())
    moments = 2 * sum(parameter.numel() * 4 for parameter in student.parameters() if parameter.requires_grad)
    needed = weights + 2 * (weights + moments)
    existing = next(folder for folder in [run_dir.path, *run_dir.path.absolute().parents] if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"run_dir: {str(run_dir.path)!r} needs {needed / 2**30:.2f} GiB for the student and two checkpoints, "
            f"{free / 2**30:.2f} GiB are free; free some, or give another folder with run_dir=PATH"
        )
