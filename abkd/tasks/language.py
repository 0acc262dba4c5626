"""Language models: what `abkd.run` asks of a task."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from abkd import config
from abkd.card import language_card as model_card
from abkd.data.corpus import Corpus
from abkd.generation import generate_ids
from abkd.language_teachers import movable_models
from abkd.measures import measure, measure_before
from abkd.models.adapters import is_adapted, load_trained, merged
from abkd.models.sharding import shard
from abkd.parts import DTYPES, make_objective, make_rollouts, make_vllm
from abkd.rundir import RunDir
from abkd.setup import Setup, make_student, prepare
from abkd.tasks.arguments import training_arguments
from abkd.trainer import DistillationTrainer

__all__ = [
    "is_adapted", "load_trained", "make_student", "make_trainer", "measure", "measure_before", "model_card", "place",
    "prepare", "save_student", "trained",
]  # fmt: skip


def make_trainer(
    recipe: config.LanguageRecipe,
    setup: Setup,
    student: PreTrainedModel,
    run_dir: RunDir,
    callbacks: Sequence[Any] = (),
) -> DistillationTrainer:
    options = recipe.training
    return DistillationTrainer(
        model=student,
        args=training_arguments(
            options,
            run_dir,
            max_grad_norm=options.max_grad_norm,
            eval_batch_size=recipe.evaluation.batch_size,
            validate_every=options.validate_every,
            save_every=options.steps_between_checkpoints,
            best=options.keep_best,
            lr_scheduler_type="constant_with_warmup" if options.schedule == "constant" else options.schedule,
            warmup_steps=options.warmup_steps,
        ),
        teacher=setup.teacher,
        objective=make_objective(recipe.objective),
        train_examples=setup.train,
        validation_examples=setup.validation,
        tokenizer=setup.tokenizer,
        callbacks=callbacks,
        group_by_length=options.group_by_length,
        pack=options.pack,
        rollouts=make_rollouts(recipe.rollouts, _generate_of(recipe, student)),
        corpus=None if setup.corpus is None else Corpus(setup.corpus, options.seed),
        lm_weight=recipe.objective.lm_weight,
        logits=options.logits,
    )


def _generate_of(recipe: config.LanguageRecipe, student: PreTrainedModel) -> Callable[..., list[list[int]]]:
    """What samples the rollouts."""
    section = recipe.rollouts
    if section.kind == "fixed" or section.engine == "transformers":
        return generate_ids
    max_tokens = recipe.data.max_prompt_tokens + section.max_new_tokens
    dtype = DTYPES[recipe.training.precision]
    return make_vllm(student, max_tokens=max_tokens, memory=section.vllm_memory, dtype=dtype)


def place(recipe: config.LanguageRecipe, setup: Setup, student: PreTrainedModel, device: torch.device) -> None:
    """Student and teacher where this rank trains: whole, but the teacher of fsdp2; a quantised one is there already."""
    student.to(device)
    for model in movable_models(recipe, setup.teacher):
        if recipe.training.engine == "fsdp2":
            shard(model)
        else:
            model.to(device)


def teacher_model(setup: Setup) -> PreTrainedModel | None:
    """None where the teacher is not a model in this process."""
    return None if setup.teacher is None else setup.teacher.model


def trained(recipe: config.LanguageRecipe, student: PreTrainedModel) -> PreTrainedModel:
    """What is saved of a student that has had all its steps."""
    return merged(student) if recipe.student.lora and recipe.student.lora.merge else student


def save_student(student: PreTrainedModel, trainer: DistillationTrainer, folder: Path) -> Callable[[], None]:
    """In Hugging Face format, with the tokenizer: what the first rank does, after all have gathered the weights."""
    sharded = trainer.is_fsdp_enabled
    state = {"state_dict": trainer.accelerator.get_state_dict(trainer.model)} if sharded else {}

    def write() -> None:
        student.save_pretrained(folder, **state)
        trainer.processing_class.save_pretrained(folder)

    return write
