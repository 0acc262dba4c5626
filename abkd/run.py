"""A recipe becomes objects, the objects train, and the folder of the run says what came out."""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, TrainingArguments

from abkd import config
from abkd.callbacks import MetricsWriter, ProgressBar, StopOnInterrupt, ValidateLast, Watch, quiet
from abkd.card import CARD, model_card
from abkd.data.corpus import Corpus
from abkd.engine import check_engine, describe, trainer_options
from abkd.errors import InputError
from abkd.generation import generate_ids
from abkd.inputs import Inputs
from abkd.measures import measure, measure_before
from abkd.models.adapters import is_adapted, load_trained, merged
from abkd.models.sharding import shard
from abkd.parts import DTYPES, make_objective, make_rollouts, make_vllm
from abkd.ranks import on_all, on_first
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
    check_engine(recipe.training)
    say(describe(recipe.training))
    setup = on_all(lambda: prepare(recipe, inputs, say, to_train=True))
    return distil(recipe, setup, on_all(lambda: make_student(recipe, setup, say)), say)


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
            seed=options.seed,
            logging_steps=options.log_every,
            eval_strategy="steps" if options.validate_every else "no",
            eval_steps=options.validate_every or None,
            save_strategy="steps" if options.steps_between_checkpoints else "no",
            save_steps=options.steps_between_checkpoints or 1,
            save_total_limit=3 if options.keep_best else 2,
            load_best_model_at_end=options.keep_best is not None,
            metric_for_best_model=options.keep_best and f"validation_{options.keep_best}",
            greater_is_better=options.keep_best == "token_agreement",
            report_to=list(options.report_to) or "none",
            disable_tqdm=True,
            **trainer_options(options),
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
        pack=options.pack,
        rollouts=make_rollouts(recipe.rollouts, _generate_of(recipe, student)),
        corpus=None if setup.corpus is None else Corpus(setup.corpus, options.seed),
        lm_weight=recipe.objective.lm_weight,
        logits=options.logits,
    )
    quiet(trainer)
    return trainer


def _generate_of(recipe: config.Recipe, student: PreTrainedModel) -> Callable[..., list[list[int]]]:
    """What samples the rollouts."""
    section = recipe.rollouts
    if section.kind == "fixed" or section.engine == "transformers":
        return generate_ids
    max_tokens = recipe.data.max_prompt_tokens + section.max_new_tokens
    dtype = DTYPES[recipe.training.precision]
    return make_vllm(student, max_tokens=max_tokens, memory=section.vllm_memory, dtype=dtype)


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
    on_first(lambda: _open(recipe, run_dir, student))
    stop, bar = StopOnInterrupt(say), ProgressBar(run_dir.path.name)
    last = [ValidateLast()] if recipe.training.keep_best else []
    callbacks = [stop, bar, Watch(say, run_dir.log), *last]
    trainer = on_all(lambda: make_trainer(recipe, setup, student, run_dir, callbacks))
    say(trainer.how_logits)
    _place(recipe, setup, student, trainer.args.device)
    keep = run_dir.path / EVALUATION
    measured = measured or on_first(lambda: run_dir.read_json(BEFORE)) or measure_before(recipe, setup, student, keep)
    on_first(lambda: run_dir.write_json(BEFORE, measured))
    started = time.monotonic()
    if trained := on_first(lambda: _trained_weights(run_dir)):
        student = on_all(lambda: load_trained(student, trained))
    else:
        with stop, bar:
            _train_from_last_checkpoint(trainer, run_dir, say)
        if trainer.state.global_step < trainer.state.max_steps:
            return None
    seconds = time.monotonic() - started
    if recipe.student.lora and recipe.student.lora.merge:
        student = merged(student)
    if not on_first(run_dir.student.exists):
        _save_student(student, trainer, run_dir)
    results = measured | {
        "after": measure(recipe, setup, student, keep / "after"),
        "calibration": str(trainer.objective.calibration) if trainer.objective.kd_weight > 0 else None,
        "divergence": str(trainer.objective.divergence) if trainer.objective.kd_weight > 0 else None,
        "num_steps": run_dir.last_step(),
        "student_step": run_dir.best_step() or run_dir.last_step(),
        "training_s": None if recipe.resume else round(seconds, 1),
    }
    on_first(lambda: _close(recipe, run_dir, results))
    return results


def _open(recipe: config.Recipe, run_dir: RunDir, student: PreTrainedModel) -> None:
    _check_disk(run_dir, student, num_checkpoints=3 if recipe.training.keep_best else 2)
    if recipe.resume:
        run_dir.drop_torn_checkpoints()
    else:
        run_dir.create(recipe.to_yaml())


def _close(recipe: config.Recipe, run_dir: RunDir, results: dict[str, Any]) -> None:
    (run_dir.student / CARD).write_text(model_card(recipe, results), encoding="utf-8")
    run_dir.write_json(RESULTS, results)


def _place(recipe: config.Recipe, setup: Setup, student: PreTrainedModel, device: torch.device) -> None:
    """Student and teacher where this rank trains: whole, but the teacher of fsdp2; a quantised one is there already."""
    student.to(device)
    if setup.teacher is None or recipe.teacher is None or recipe.teacher.quantization != "none":
        return
    if recipe.training.engine == "fsdp2":
        shard(setup.teacher.model)
    else:
        setup.teacher.model.to(device)


def _trained_weights(run_dir: RunDir) -> Path | None:
    """The folder of a student that has had all its steps, if the run got that far."""
    if run_dir.student.exists():
        return run_dir.student
    state = run_dir.trainer_state()
    if state is None or state["global_step"] < state["max_steps"]:
        return None
    return run_dir.checkpoint(run_dir.best_step() or state["global_step"])  # the Trainer would take one step too many


def _train_from_last_checkpoint(trainer: DistillationTrainer, run_dir: RunDir, say: Say) -> None:
    whole = on_first(run_dir.whole_checkpoints)
    on_first(lambda: run_dir.drop_metrics_after(int(whole[-1].name.rpartition("-")[2]) if whole else -1))
    if whole:
        say(f"going on from {whole[-1]}")
    trainer.train(resume_from_checkpoint=str(whole[-1]) if whole else None)


def _save_student(student: PreTrainedModel, trainer: DistillationTrainer, run_dir: RunDir) -> None:
    """Written aside and renamed: the folder `student` is whole or absent."""
    sharded = trainer.is_fsdp_enabled
    state = {"state_dict": trainer.accelerator.get_state_dict(trainer.model)} if sharded else {}

    def write() -> None:
        part = run_dir.path / ".student.part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            student.save_pretrained(part, **state)
            trainer.processing_class.save_pretrained(part)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(part, ignore_errors=True)
            raise InputError(
                f"run_dir: the student cannot be written to {str(run_dir.path)!r} ({error}); "
                "free some disk, then go on with resume=true"
            ) from error
        os.replace(part, run_dir.student)

    on_first(write)


def _check_disk(run_dir: RunDir, student: PreTrainedModel, num_checkpoints: int) -> None:
    """Room for the student, and for checkpoints of its weights, or its adapter alone, and of Adam's two moments."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in student.parameters())
    trained = 4 * sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    needed = weights + num_checkpoints * ((trained if is_adapted(student) else weights) + 2 * trained)
    existing = next(folder for folder in [run_dir.path, *run_dir.path.absolute().parents] if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"run_dir: {str(run_dir.path)!r} needs {needed / 2**30:.2f} GiB for the student and {num_checkpoints} "
            f"checkpoints, {free / 2**30:.2f} GiB are free; free some, or give another folder with run_dir=PATH"
        )
