"""The sections of a recipe's training -> the Trainer's own arguments."""

import os
from typing import Any

from transformers import TrainingArguments

from abkd.config import Training
from abkd.engine import trainer_options
from abkd.errors import InputError
from abkd.rundir import RunDir

GREATER_IS_BETTER = ("token_agreement", "top1")


def training_arguments(
    options: Training,
    run_dir: RunDir,
    *,
    max_grad_norm: float,
    eval_batch_size: int,
    validate_every: int,
    save_every: int,
    best: str | None,
    **schedule: Any,
) -> TrainingArguments:
    """What both tasks tell the Trainer in the same words.

    Args:
        validate_every, save_every: optimiser steps; 0 for never.
        best: the validation's figure by which the best checkpoint is kept; None keeps the last ones.
        schedule: the Trainer's arguments of the learning rate's schedule.
    """
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run_dir.path / "tensorboard")
    try:
        return TrainingArguments(
            output_dir=str(run_dir.checkpoints),
            max_steps=options.num_steps or -1,
            num_train_epochs=options.num_epochs,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=eval_batch_size,
            gradient_accumulation_steps=options.accumulation,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            max_grad_norm=max_grad_norm,
            seed=options.seed,
            logging_steps=options.log_every,
            eval_strategy="steps" if validate_every else "no",
            eval_steps=validate_every or None,
            save_strategy="steps" if save_every else "no",
            save_steps=save_every or 1,
            save_total_limit=3 if best else 2,
            load_best_model_at_end=best is not None,
            metric_for_best_model=best and f"validation_{best}",
            greater_is_better=best in GREATER_IS_BETTER,
            report_to=list(options.report_to) or "none",
            disable_tqdm=True,
            **schedule,
            **trainer_options(options),
        )
    except ValueError as error:
        raise InputError(f"training: {error}") from error
