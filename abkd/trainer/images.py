"""Distillation of image classifiers: the loss at a batch of images, which student and teacher see alike."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerCallback, TrainingArguments

from abkd.data.images import Augmentation, EpochSampler, Images, repeated
from abkd.errors import InputError
from abkd.evaluation.classification import ClassificationMeter
from abkd.features import AttachedTerm
from abkd.objective import Objective
from abkd.ranks import num_ranks, rank, summed, take_from_first
from abkd.targets import DenseTargets
from abkd.teachers.cached_classifier import CachedClassifierTeacher
from abkd.teachers.classifier import AbstractClassifierTeacher
from abkd.trainer.loop import VALIDATION_DIVERGENCES, AbstractDistillationTrainer

_NAMES = {
    "num_tokens": "num_images",
    "tokens_per_s": "images_per_s",
    "token_accuracy": "accuracy",
    "token_agreement": "agreement",
}
"""What the log of a language model calls what an image classifier has too."""
_FEATURES = "features.safetensors"
"""What the terms remember, in a checkpoint."""


class ImageDistillationTrainer(AbstractDistillationTrainer):
    """Trains `model`, a classifier, towards `teacher` under `objective`.

    Args:
        model: images `[batch, 3, height, width]` in 0 to 1 -> logits `[batch, classes]`; it normalises them itself, as
            `ImageClassifier` does.
        teacher: of the same classes; one that is no model has no layers for terms. None where kd_weight is 0.
        train_images, validation_images: with labels; one of -100 counts for the divergence alone.
        augmentation: of the training images; the teacher sees the same ones. None leaves them as they are.
        terms: on features of both models, attached to them; in one process. Their parameters are trained too.
        make_optimizer: of the parameters that are trained; None is the Trainer's own AdamW.
        rate_factor: of the learning rate, at an epoch (0 at the start, with fractions); None is the Trainer's schedule.

    The gradient of an optimiser step is that of the mean over all its images, however they are spread over
    micro-batches and ranks.
    """

    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        teacher: AbstractClassifierTeacher | None,
        objective: Objective,
        train_images: Images,
        validation_images: Images,
        augmentation: Augmentation | None = None,
        terms: Sequence[AttachedTerm] = (),
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        rate_factor: Callable[[float], float] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        args.dataloader_pin_memory = False  # a batch is a few keys
        super().__init__(
            model=model,
            args=args,
            objective=objective,
            has_teacher=teacher is not None,
            train_examples=train_images,
            validation_examples=validation_images,
            collator=lambda keys: {"keys": torch.tensor(keys)},
            callbacks=callbacks,
        )
        device = self.args.device
        self.teacher = teacher
        if teacher is not None and teacher.model is not None:
            teacher.model.to(device)
        self.train_images, self.validation_images = train_images.to(device), validation_images.to(device)
        self.augmentation = augmentation
        if terms and make_optimizer is None:
            raise InputError("terms have parameters to train beside the model's; give make_optimizer")
        self.terms = nn.ModuleList(terms).to(device)
        if terms and self.args.world_size > 1:
            raise InputError(
                f"objective.features: what they remember is of one process, and these are {self.args.world_size}; "
                "start one, or leave the features out"
            )
        self._teacher_logits: Tensor | None = None  # of the validation images
        self.make_optimizer, self.rate_factor = make_optimizer, rate_factor

    def loss_of(
        self, model: nn.Module, inputs: dict[str, Tensor], objective: Objective, count: Tensor | int | None
    ) -> Tensor:
        keys = repeated(inputs["keys"], self.augmentation, len(self.train_images))
        images, labels = self.train_images.batch(keys, self.augmentation), self.train_images.labels_of(keys)
        teacher_logits = None
        if self.teacher is not None and (objective.kd_weight > 0 or self.terms):
            teacher_logits = self.teacher.logits(images, keys)
        logits = model(images)
        loss = objective(
            student_logits=logits,
            teacher_logits=teacher_logits,
            labels=labels,
            num_tokens=len(keys) if count is None else count,
        )
        every = torch.ones_like(keys)
        self._log.add(loss, every, every)
        total = loss.total
        for term in self.terms:
            added = term.weight * term(keys % len(self.train_images)).sum()
            self._log.add_features(added)
            total = total + added / (len(keys) if count is None else count)
        if self._look_at_rows:
            self._look_at_rows = False
            targets = None if teacher_logits is None else DenseTargets(teacher_logits)
            self._log.add_rows(
                DenseTargets(logits.detach()), targets, labels, self.state.global_step, self.step_of(objective)
            )
        return total

    def save_extra(self, folder: Path) -> None:
        if self.terms:
            save_file(self.terms.state_dict(), folder / _FEATURES)

    def load_extra(self, folder: Path) -> None:
        if self.terms:
            self.terms.load_state_dict(load_file(folder / _FEATURES))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The weights of a checkpoint: of a model that says which it trains, those alone."""
        if state_dict is None and hasattr(self.model, "trained_state"):
            state_dict = self.model.trained_state()
        super()._save(output_dir, state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """The Trainer's own, of what a checkpoint lacks: as it should, where it holds what is trained alone."""
        if not hasattr(self.model, "trained_state"):
            super()._issue_warnings_after_load(load_result)

    def measure(self, examples: Images) -> dict[str, float]:
        """`ClassificationMeter.result`."""
        size = self.args.per_device_eval_batch_size
        if self.teacher is not None and self._teacher_logits is None:
            self._teacher_logits = teacher_logits(self.teacher, examples, size)
        meter = ClassificationMeter(VALIDATION_DIVERGENCES if self.teacher else None)
        classify(self.model, examples, meter, batch_size=size, teacher_logits=self._teacher_logits)
        return {name: value for name, value in meter.result().items() if isinstance(value, (int, float))}

    def figures(self, sums: dict[str, float], seconds: float) -> dict[str, float]:
        line = super().figures(sums, seconds)
        del line["masked_share"]
        return {_NAMES.get(name, name): value for name, value in line.items()}

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.make_optimizer is None or self.optimizer is not None:
            return super().create_optimizer(model)
        parameters = [*self.model.parameters(), *self.terms.parameters()]
        self.optimizer = made = self.make_optimizer([each for each in parameters if each.requires_grad])
        made.register_step_post_hook(lambda *_: self.terms.zero_grad())  # the Trainer does it for the model alone
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        if self.rate_factor is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        factor, args = self.rate_factor, self.args
        size, accumulation, drop_last = (
            args.train_batch_size,
            args.gradient_accumulation_steps,
            args.dataloader_drop_last,
        )
        steps = steps_per_epoch(len(self.train_images), size, accumulation, drop_last=drop_last)
        made = LambdaLR(optimizer or self.optimizer, lambda step: factor(step / steps))
        self.lr_scheduler = made
        return made

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> int:
        """Every image counts; a number, which no GPU has to be asked for."""
        count = sum(len(batch["keys"]) for batch in batch_samples)
        if self.args.average_tokens_across_devices:
            count = int(summed({"images": count})["images"])
        return count

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return EpochSampler(len(self.train_images), self.args.seed)


def steps_per_epoch(num_images: int, batch_size: int, accumulation: int, *, drop_last: bool = False) -> int:
    """Optimiser steps in a pass over the training images, of all ranks together."""
    images_at_once = batch_size * num_ranks()
    batches = num_images // images_at_once if drop_last else -(-num_images // images_at_once)
    return -(-batches // accumulation)


@torch.no_grad()
def classify(
    model: nn.Module,
    images: Images,
    meter: ClassificationMeter,
    *,
    batch_size: int,
    teacher_logits: Tensor | None = None,
) -> None:
    """Feeds the meter the model's logits of all images; of several ranks each does its part, with one model.

    The running means of a rank that trains are of its own images; those of the first rank are saved, and all take them.

    Args:
        teacher_logits: `[N, classes]`, `all_logits` of the teacher.
    """
    take_from_first(model.buffers())
    was_training = model.training
    model.eval()
    for number, keys in enumerate(torch.arange(len(images)).split(batch_size)):
        if number % num_ranks() == rank():
            given = None if teacher_logits is None else teacher_logits[keys]
            meter.add(model(images.batch(keys)), images.labels_of(keys), given)
    model.train(was_training)


def teacher_logits(teacher: AbstractClassifierTeacher, images: Images, batch_size: int) -> Tensor:
    """`all_logits` of the teacher, or what it has of them."""
    if isinstance(teacher, CachedClassifierTeacher):
        return teacher.plain_logits(images.part)
    assert teacher.model is not None
    return all_logits(teacher.model, images, batch_size)


@torch.no_grad()
def all_logits(model: nn.Module, images: Images, batch_size: int) -> Tensor:
    """`[N, classes]` in fp32, in main memory, of a model in evaluation mode."""
    batches = torch.arange(len(images)).split(batch_size)
    return torch.cat([model(images.batch(keys)).float().cpu() for keys in batches])
