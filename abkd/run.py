"""A recipe becomes objects, the objects train, and the folder of the run says what came out."""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from abkd import config
from abkd.analysis.mass import RankMassMeter
from abkd.calibrations import CALIBRATIONS, Calibration, Plain
from abkd.data.batches import Collator, batches_by_length, num_tokens
from abkd.data.instructions import EncodingCounts, Example, encode
from abkd.divergences import KINDS, AlphaBeta, AlphaBetaSchedule, Divergence, Ramp
from abkd.errors import InputError
from abkd.evaluation.fidelity import fidelity
from abkd.evaluation.rouge import rouge_l
from abkd.fit import advice, device_of, free_bytes
from abkd.generation import generate
from abkd.inputs import Inputs
from abkd.kernels.memory import Step, StepMemory, step_memory
from abkd.models.pretrained import load_model, load_skeleton, load_tokenizer
from abkd.models.students import shrink
from abkd.objective import Objective
from abkd.rundir import RESULTS, RunDir
from abkd.teachers.in_process import InProcessTeacher
from abkd.trainer import (
    VALIDATION_DIVERGENCES,
    DistillationTrainer,
    MetricsWriter,
    ProgressBar,
    StopOnInterrupt,
    quiet,
)
from abkd.vocab import align_widths, check_same_vocabulary

BEFORE = "before.json"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """What runs of one teacher on one data set share."""

    teacher: InProcessTeacher | None
    tokenizer: PreTrainedTokenizerBase
    train: list[Example]
    validation: list[Example]


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


def say_memory(recipe: config.Recipe, say: Say, train: Sequence[Example] = ()) -> None:
    """What a training step needs, and what to change where it does not fit; see `step_memory_of`."""
    try:
        lines = advice(recipe, lambda changed: step_memory_of(changed, train), free_bytes(device_of(recipe)))
    except Exception as error:  # a model's own code runs on tensors without values, which not every model bears
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        lines = [f"memory: what a training step needs is not known ({reason})"]
    for line in lines:
        say(line)


def step_memory_of(recipe: config.Recipe, train: Sequence[Example] = ()) -> StepMemory:
    """Of the longest batch that `train` can give; without examples, of a batch of data.max_tokens each."""
    size = recipe.training.batch_size
    lengths = sorted(map(num_tokens, train))[-size:] or [recipe.data.max_tokens] * size
    completions = sorted(len(example.completion_ids) for example in train)[-size:] or lengths
    objective = make_objective(recipe.objective).at(1.0)

    def make_models() -> tuple[PreTrainedModel, PreTrainedModel | None]:
        named = recipe.teacher
        teacher = named and load_skeleton(named.path, "teacher.path", named.dtype)
        match recipe.student:
            case config.Shrink() as section:
                student = shrink(teacher, section.layers or section.keep_layers).float()
            case config.Pretrained(path=path):
                student = load_skeleton(path, "student.path")
        _freeze(student, recipe.student)
        if recipe.training.activation_checkpointing:
            getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)()
        return student.train(), teacher

    def dense_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        logits = {"student_logits": student_logits, "teacher_logits": teacher_logits}
        return objective(**logits, labels=labels, num_tokens=len(labels)).total

    is_dense = recipe.training.logits == "dense" or objective.needs_logits
    loss = dense_loss if is_dense else objective.divergence
    assert loss is not None and not isinstance(loss, AlphaBetaSchedule)
    step = Step(
        batch_size=len(lengths),
        length=lengths[-1],
        num_tokens=sum(completions),
        loss=loss,
        autocast=torch.bfloat16 if recipe.training.precision == "bf16" else None,
        accumulates=recipe.training.accumulation > 1,
        device=device_of(recipe),
    )
    return step_memory(make_models, step)


def prepare(recipe: config.Recipe, inputs: Inputs, say: Say, to_train: bool = False) -> Setup:
    """Loads the teacher and tokenises the data; `to_train`: says first what memory a training step needs."""
    if recipe.teacher is not None:
        tokenizer = load_tokenizer(recipe.teacher.path, "teacher.path")
    else:
        assert isinstance(recipe.student, config.Pretrained)
        tokenizer = load_tokenizer(recipe.student.path, "student.path")
    options = recipe.data.model_dump(include={"prompt_format", "max_prompt_tokens", "max_tokens", "long_prompts"})
    train, train_counts = encode(inputs.train, tokenizer, **options)
    validation, validation_counts = encode(inputs.validation, tokenizer, **options, first_id=len(train))
    say(f"train: {_describe(train_counts)}")
    say(f"validation: {_describe(validation_counts)}")
    if to_train:
        say_memory(recipe, say, train)
    if recipe.teacher is None:
        return Setup(None, tokenizer, train, validation)
    say(f"loading the teacher {recipe.teacher.path}")
    model = load_model(recipe.teacher.path, "teacher.path", recipe.teacher.dtype)
    return Setup(InProcessTeacher(model, remember=recipe.teacher.remember), tokenizer, train, validation)


def make_student(recipe: config.Recipe, setup: Setup, say: Say) -> PreTrainedModel:
    """The student before training, with the teacher's vocabulary: refused, or the wider of the two cut, if not."""
    set_seed(recipe.training.seed)
    teacher = setup.teacher and setup.teacher.model
    match recipe.student:
        case config.Shrink() as section:
            student = shrink(teacher, section.layers or section.keep_layers).float()
        case config.Pretrained(path=path):
            if teacher is not None:
                check_same_vocabulary(student=load_tokenizer(path, "student.path"), teacher=setup.tokenizer)
            student = load_model(path, "student.path")
    if teacher is not None and (line := align_widths(student=student, teacher=teacher, tokenizer=setup.tokenizer)):
        say(line)
    _freeze(student, recipe.student)
    return student


def _freeze(student: PreTrainedModel, section: config.Student) -> None:
    if section.freeze_embeddings:
        student.get_input_embeddings().requires_grad_(False)
        student.get_output_embeddings().requires_grad_(False)


def make_objective(section: config.Objective) -> Objective:
    return Objective(make_calibration(section), section.kd_weight, section.ce_weight, section.kd_warmup)


def make_calibration(section: config.Objective) -> Calibration:
    if section.divergence is not None:
        temperatures = section.model_dump(include=set(config.TEMPERATURES))
        return Plain(make_divergence(section.divergence), **temperatures)
    if section.calibration is None:
        return Plain(AlphaBeta())  # kd_weight is 0: it is not computed
    parameters = {name: value for name, value in section.calibration if name != "kind"}
    if "divergence" in parameters:
        parameters["divergence"] = make_divergence(parameters["divergence"])
    return CALIBRATIONS[section.calibration.kind](**parameters)


def make_divergence(section: config.Divergence) -> Divergence | AlphaBetaSchedule:
    parameters = {
        name: Ramp(value.start, value.end, value.shape) if isinstance(value, config.Ramp) else value
        for name, value in section
        if name != "kind"
    }
    if any(isinstance(value, Ramp) for value in parameters.values()):
        return AlphaBetaSchedule(**parameters)
    return KINDS[section.kind](**parameters)


def make_trainer(
    recipe: config.Recipe, setup: Setup, student: PreTrainedModel, run_dir: RunDir, callbacks: Sequence[Any] = ()
) -> DistillationTrainer:
    options = recipe.training
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
            report_to="none",
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
    trainer = make_trainer(recipe, setup, student, run_dir, [stop, bar])
    say(trainer.how_logits)
    if setup.teacher is not None:
        setup.teacher.model.to(trainer.args.device)
    measured = measured or run_dir.read_json(BEFORE) or measure_before(recipe, setup, student)
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
        "after": measure(recipe, setup, student),
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


def measure_before(recipe: config.Recipe, setup: Setup, student: PreTrainedModel) -> dict[str, Any]:
    """What `measure` says of the teacher, if there is one, and of the untrained student."""
    teacher = {"teacher": measure(recipe, setup, setup.teacher.model)} if setup.teacher else {}
    return teacher | {"before": measure(recipe, setup, student)}


def measure(recipe: config.Recipe, setup: Setup, model: PreTrainedModel) -> dict[str, Any]:
    """Fidelity to the teacher on the validation data, and answers with their ROUGE-L if asked for.

    Keys: those of `fidelity`, `num_parameters`, with a teacher `rank_mass`, with answers `rouge_l` and `answers`.
    """
    meter = RankMassMeter()
    size = recipe.evaluation.batch_size
    batches = batches_by_length(setup.validation, Collator.of(setup.tokenizer), size)
    num_batches = -(-len(setup.validation) // size)
    bar = tqdm(batches, total=num_batches, desc="measuring", unit="batch", leave=False)
    teacher_logits = None if setup.teacher is None else setup.teacher.logits
    result: dict[str, Any] = {
        **fidelity(model, teacher_logits, bar, VALIDATION_DIVERGENCES, per_token=meter),
        **({"rank_mass": meter.result()._asdict()} if setup.teacher else {}),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    asked = setup.validation[: recipe.evaluation.num_generated]
    if asked:
        result["answers"] = answer(recipe, setup, model)
        result["rouge_l"] = rouge_l(
            result["answers"], [example.references or [example.completion] for example in asked]
        )
    return result


def answer(recipe: config.Recipe, setup: Setup, model: PreTrainedModel) -> list[str]:
    """The model's answers to the first `evaluation.num_generated` validation prompts."""
    options = recipe.evaluation
    prompts = [example.prompt for example in setup.validation[: options.num_generated]]
    with tqdm(total=len(prompts), desc="answering", unit="prompt", leave=False) as bar:
        completions = generate(
            model,
            setup.tokenizer,
            prompts,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            batch_size=options.batch_size,
            seed=recipe.training.seed,
            progress=bar.update,
        )
    return [completion.text for completion in completions]


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


def _describe(counts: EncodingCounts) -> str:
    return (
        f"{counts.num_examples:,} examples, {counts.num_tokens:,} completion tokens, "
        f"{counts.num_completions_cut:,} completions cut, {counts.num_long_prompts_dropped:,} long prompts dropped"
    )
