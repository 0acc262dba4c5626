"""Image classifiers: what `abkd.run` asks of a task."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from abkd import config
from abkd.card import image_card as model_card
from abkd.config.image_models import CachedClassifier, CLIPStudent, CLIPTeacher, ImageModel
from abkd.data.clip_sets import CLIP_SETS, CONTEXT, base_and_new
from abkd.data.image_folders import FolderStore
from abkd.data.images import Images, ImageStore
from abkd.data.labelled_images import ImageFiles, LabelledImages
from abkd.errors import InputError
from abkd.evaluation.base_and_new import BaseToNewMeter
from abkd.evaluation.classification import ClassificationMeter
from abkd.image_inputs import ImageInputs, classifier_arguments, images_of
from abkd.models.classifiers import load_classifier, save_classifier
from abkd.models.clip import PromptedClassifier
from abkd.models.image_classifier import ImageClassifier
from abkd.objective import IGNORED_LABEL
from abkd.parts import make_augmentation, make_objective, make_terms
from abkd.paths import find_path
from abkd.ranks import is_first
from abkd.rundir import RunDir
from abkd.setup import Say
from abkd.tasks import clip
from abkd.tasks.arguments import training_arguments
from abkd.teachers.cache.manifest import Manifest
from abkd.teachers.cache.store import Store
from abkd.teachers.cached_classifier import CachedClassifierTeacher
from abkd.teachers.classifier import AbstractClassifierTeacher, ClassifierTeacher
from abkd.trainer import VALIDATION_DIVERGENCES, ImageDistillationTrainer
from abkd.trainer.images import classify, steps_per_epoch, teacher_logits
from abkd.trainer.rates import RateFactor

__all__ = [
    "is_adapted", "load_trained", "make_student", "make_trainer", "measure", "measure_before", "model_card", "place",
    "prepare", "save_student", "teacher_model", "trained",
]  # fmt: skip


@dataclass(frozen=True)
class ImageSetup:
    """What runs of one teacher on one data set share."""

    teacher: AbstractClassifierTeacher | None
    train: Images
    validation: Images | None
    """Training images set aside, if any."""
    test: Images
    _teacher_test_logits: list[Tensor] = field(default_factory=list)

    def teacher_test_logits(self, batch_size: int) -> Tensor | None:
        """`[N, classes]`, made once."""
        if self.teacher is not None and not self._teacher_test_logits:
            self._teacher_test_logits.append(teacher_logits(self.teacher, self.test, batch_size))
        return self._teacher_test_logits[0] if self._teacher_test_logits else None


def prepare(recipe: config.ImageRecipe, inputs: ImageInputs, say: Say, to_train: bool = False) -> ImageSetup:
    """Loads the teacher, and puts the images where batches are made of them."""
    say(inputs.summary)
    train = _store(inputs.train, "train")
    train.labels = train.labels.masked_fill(~torch.from_numpy(inputs.is_labelled), IGNORED_LABEL)
    validation = None if inputs.validation is None else _store(inputs.validation, "validation")
    teacher = None
    if recipe.teacher is not None:
        teacher = _open_cache(recipe, inputs) if recipe.teacher.kind == "cached" else _load(recipe, train.classes, say)
    return ImageSetup(teacher, train, validation, _store(inputs.test, "test"))


def _store(images: LabelledImages, part: str) -> Images:
    store: Images
    if isinstance(images, ImageFiles):
        store = FolderStore(images.images.tolist(), images.labels, images.classes, size=images.size)
    else:
        store = ImageStore(images)
    store.part = part
    return store


def _open_cache(recipe: config.ImageRecipe, inputs: ImageInputs) -> CachedClassifierTeacher:
    assert recipe.teacher is not None
    folder = find_path(recipe.teacher.path, "teacher.path")
    store = Store(folder, Manifest.read_whole(folder, "teacher.path", recipe.task), "teacher.path")
    return CachedClassifierTeacher(store, images_of(recipe, inputs), num_distinct_epochs(recipe, len(inputs.train)))


def num_distinct_epochs(recipe: config.ImageRecipe, num_images: int) -> int:
    """Of the training, after which its augmented images come again."""
    options = recipe.training
    steps = steps_per_epoch(num_images, options.batch_size, options.accumulation, drop_last=options.drop_last)
    num_epochs = math.ceil(options.num_epochs or options.num_steps / steps)
    return min(num_epochs, make_augmentation(recipe.data.augmentation).period or num_epochs)


def _load(recipe: config.ImageRecipe, classes: tuple[str, ...], say: Say) -> ClassifierTeacher:
    section = recipe.teacher
    assert section is not None and not isinstance(section, CachedClassifier)
    say(f"loading the teacher {section.path or getattr(section, 'name', '')}")
    return ClassifierTeacher(_make_teacher(section, recipe, classes), remember=section.remember)


def _make_teacher(section: Any, recipe: config.ImageRecipe, classes: tuple[str, ...]) -> nn.Module:
    if isinstance(section, CLIPTeacher):
        template = CLIP_SETS[recipe.data.clip_set].template if recipe.data.clip_set else CONTEXT
        return clip.make_teacher(section, classes, template)
    return make_model(section, "teacher", classes, seed=recipe.training.seed)


def make_model(section: ImageModel, field: str, classes: tuple[str, ...], *, seed: int) -> ImageClassifier:
    """The model that the section describes, for these classes."""
    return load_classifier(**classifier_arguments(section, field), num_classes=len(classes), classes=classes, seed=seed)


def make_student(recipe: config.ImageRecipe, setup: ImageSetup, say: Say) -> nn.Module:
    section, classes, seed = recipe.student, setup.train.classes, recipe.training.seed
    if isinstance(section, CLIPStudent):
        num_base = len(base_and_new(len(classes))[0]) if recipe.data.labels == "base" else None
        teacher = None if setup.teacher is None else setup.teacher.model
        return clip.make_student(section, classes, teacher, num_base=num_base, seed=seed)
    return make_model(section, "student", classes, seed=seed)


def teacher_model(setup: ImageSetup) -> nn.Module | None:
    """None where the teacher is not a model in this process."""
    return None if setup.teacher is None else setup.teacher.model


def check_teacher_loads(recipe: config.ImageRecipe) -> None:
    """Raises InputError where the teacher will not be a model in this process."""
    if isinstance(recipe.teacher, CachedClassifier):
        raise InputError(
            "teacher.kind=cached: this needs the teacher's network, which a cache has not; give the teacher itself"
        )


def loaded_teacher(setup: ImageSetup) -> nn.Module:
    """Of a recipe that `check_teacher_loads` lets pass."""
    model = teacher_model(setup)
    assert model is not None
    return model


def make_trainer(
    recipe: config.ImageRecipe, setup: ImageSetup, student: nn.Module, run_dir: RunDir, callbacks: Sequence[Any] = ()
) -> ImageDistillationTrainer:
    options = recipe.training
    steps = steps_per_epoch(len(setup.train), options.batch_size, options.accumulation, drop_last=options.drop_last)
    selected = setup.validation if options.select_on == "validation" else setup.test
    assert selected is not None
    terms = [
        term.attach(
            student,
            loaded_teacher(setup),
            lambda model: model(setup.train.batch(torch.arange(min(2, len(setup.train))))),
            num_examples=len(setup.train),
            labels=setup.train.labels,
        )
        for term in make_terms(recipe.objective, options.seed)
    ]
    return ImageDistillationTrainer(
        model=student,
        args=training_arguments(
            options,
            run_dir,
            max_grad_norm=options.max_grad_norm,
            eval_batch_size=recipe.evaluation.batch_size,
            validate_every=options.validate_every_epochs * steps,
            save_every=(options.save_every_epochs or options.validate_every_epochs * options.chooses_best) * steps,
            best="top1" if options.chooses_best else None,
            dataloader_drop_last=options.drop_last,
        ),
        teacher=setup.teacher,
        objective=make_objective(recipe.objective),
        train_images=setup.train,
        validation_images=setup.validation or selected,
        augmentation=make_augmentation(recipe.data.augmentation),
        terms=terms,
        make_optimizer=optimizer_of(options),
        rate_factor=RateFactor(
            options.schedule,
            num_epochs=options.num_epochs or options.num_steps / steps,
            milestones=options.milestones,
            decay=options.decay,
            warmup_epochs=options.warmup_epochs,
        ),
        callbacks=callbacks,
    )


def optimizer_of(options: Any) -> Callable[[list[nn.Parameter]], Optimizer]:
    """Makes the optimiser of a recipe's training; weight decay is on every parameter."""

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        how = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
        if options.optimizer == "sgd":
            return SGD(parameters, momentum=options.momentum, **how)
        return AdamW(parameters, **how)

    return make


def place(recipe: config.ImageRecipe, setup: ImageSetup, student: nn.Module, device: torch.device) -> None:
    """The trainer has moved the models and the images it trains with."""
    setup.test.to(device)


def measure_before(
    recipe: config.ImageRecipe, setup: ImageSetup, student: nn.Module, keep: Path | None = None
) -> dict[str, Any]:
    model = teacher_model(setup)
    teacher = {} if model is None else {"teacher": measure(recipe, setup, model)}
    return teacher | {"before": measure(recipe, setup, student)}


def measure(
    recipe: config.ImageRecipe, setup: ImageSetup, model: nn.Module, keep: Path | None = None
) -> dict[str, Any]:
    """The result of the meter on the test images, and `num_parameters`; of a clip_set with base and new accuracy."""
    size = recipe.evaluation.batch_size
    divergences = VALIDATION_DIVERGENCES if setup.teacher else None
    temperature = recipe.evaluation.temperature
    meter = ClassificationMeter(divergences, temperature=temperature)
    if recipe.data.clip_set:
        meter = BaseToNewMeter(*base_and_new(len(setup.test.classes)), divergences, temperature=temperature)
    teacher_logits = setup.teacher_test_logits(size)
    if teacher_logits is not None and model is teacher_model(setup):
        if is_first():  # every rank has them all
            meter.add(teacher_logits, setup.test.labels.cpu(), teacher_logits)
    else:
        classify(model, setup.test, meter, batch_size=size, teacher_logits=teacher_logits)
    measured = meter.result(setup.test.classes)
    return measured | {"num_parameters": sum(parameter.numel() for parameter in model.parameters())}


def is_adapted(student: nn.Module) -> bool:
    """Whether a checkpoint holds what is trained alone."""
    return isinstance(student, PromptedClassifier)


def trained(recipe: config.ImageRecipe, student: nn.Module) -> nn.Module:
    return student


def load_trained(student: nn.Module, folder: Path) -> nn.Module:
    """The weights of a checkpoint, or of a student's folder, in `student`."""
    weights = folder / "model.safetensors"
    if isinstance(student, PromptedClassifier):
        if weights.is_file():
            student.load_trained_state(load_file(weights))
        else:
            student.load(folder)
        return student
    assert isinstance(student, ImageClassifier)
    state = load_file(weights)
    whole = all(key.startswith("network.") for key in state)  # a checkpoint holds the classifier, a folder its network
    (student if whole else student.network).load_state_dict(state)
    return student


def save_student(student: nn.Module, trainer: ImageDistillationTrainer, folder: Path) -> Callable[[], None]:
    if isinstance(student, PromptedClassifier):
        return lambda: student.save(folder)
    assert isinstance(student, ImageClassifier)
    return lambda: save_classifier(student, folder)
