"""The recipe of an image classifier."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from abkd.config.fields import Count, CountOrZero, NonNegative, Positive, Recipe, Section
from abkd.config.image_models import CachedClassifier, ImageStudent, ImageTeacher
from abkd.config.objective import Objective
from abkd.config.training import Training


class Augmentation(Section):
    """What happens to a training image, anew in each epoch; student and teacher see the same."""

    crop_padding: CountOrZero = 4
    """Black pixels on each side, out of which a part of the image's own size is cut."""
    flip: bool = True
    """Mirrored left to right, every second time."""
    scale: tuple[Positive, Positive] | None = None
    """Share of the image that is cut out and resized to its size, as [0.08, 1]; instead of crop_padding."""
    seed: CountOrZero = 0
    """Of crops and flips: epoch after epoch the same for every training.seed, so that teachers may remember."""
    repeat_every: CountOrZero = 0
    """Epochs after which they come again, so that a teacher has no more to remember or to cache; 0 for never."""

    @model_validator(mode="after")
    def _a_share(self):
        if self.scale and not self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={list(self.scale)} must rise and end at 1 or below")
        return self


class ImageData(Section):
    train: str = Field(min_length=1)
    """Images: the folder of CIFAR's python version, a folder CLASS/IMAGE or SPLIT/CLASS/IMAGE, mosaics, Parquet, .npz,
    or the hub id owner/name of a data set. docs/images.md has them all."""
    clip_set: str = ""
    """One of the eleven sets of base-to-new distillation, as Caltech101 (docs/clip.md); then train is the folder of all
    sets, and images are always decoded batch by batch. Base and new classes are measured apart."""
    labels: Literal["none", "base"] = "none"
    """Of clip_set: none trains on images of all classes without their labels, as students do; base on those of the base
    classes with their labels, as teachers do."""
    split: str = "train"
    test: str = ""
    """Likewise; empty is that of train."""
    test_split: str = "test"
    subset: str = ""
    """Of a hub's data set that has several."""
    image_column: str = ""
    """Of Parquet or the hub; empty takes image or img."""
    label_column: str = ""
    """Likewise; empty takes label, labels or fine_label."""
    image_size: CountOrZero = 0
    """Images become image_size x image_size when they are read; 0 takes them as they are, all of one size."""
    in_memory: bool = True
    """false decodes the images of a folder batch by batch, for data that does not fit; needs image_size."""
    num_validation: CountOrZero = 0
    """Training images set aside, as many of each class, always the same ones: what training.select_on=validation goes
    by."""
    num_per_class: CountOrZero = 0
    """Train on so many images of each class; 0 for all. Of clip_set on at most so many."""
    num_labelled_per_class: CountOrZero = 0
    """So many training images of each class keep their label, the others count for the divergence alone; 0 for all."""
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """Skipped ones are counted."""
    augmentation: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _decoded_to_one_size(self):
        if (self.clip_set or not self.in_memory) and not self.image_size:
            what = f"clip_set={self.clip_set}" if self.clip_set else "in_memory=false"
            raise ValueError(f"{what} decodes images batch by batch, to one size; set data.image_size, as 224")
        if not self.clip_set and self.labels == "base":
            raise ValueError("labels=base is for a clip_set; set data.clip_set, or leave it out")
        without = ["on_corrupt"] if not self.in_memory else []
        if self.clip_set:
            without = ["test", "subset", "image_column", "label_column", "on_corrupt", "in_memory", "num_validation"]
            without += ["split", "test_split", "num_labelled_per_class"]
            without += ["num_per_class"] if self.labels == "none" else []
        for name in without:
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                what = f"clip_set={self.clip_set} with labels={self.labels}" if self.clip_set else "in_memory=false"
                raise ValueError(f"{name}={value!r} is not for {what}; leave it out")
        return self


class ImageTraining(Training):
    batch_size: Count = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of sgd."""
    weight_decay: NonNegative = 5e-4
    """Of all weights, as the CIFAR recipes have it."""
    schedule: Literal["steps", "cosine", "linear", "constant"] = "steps"
    """After the warm-up; cosine and linear end at 0."""
    milestones: tuple[Positive, ...] = (150.0, 180.0, 210.0)
    """Epochs after which schedule=steps multiplies the rate by decay."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.1
    warmup_epochs: NonNegative = 0.0
    """Over which the rate rises linearly from 0."""
    drop_last: bool = False
    """Leave out a last batch that is not full: batch norm cannot be trained on a single image."""
    max_grad_norm: NonNegative = 0.0
    """0 does not clip."""
    engine: Literal["ddp"] = "ddp"
    """Of several processes: each has the whole student."""
    activation_checkpointing: Literal[False] = False
    log_every: Count = 50
    validate_every_epochs: CountOrZero = 0
    """Epochs between measures on the validation or test images during training; 0 for none."""
    save_every_epochs: CountOrZero = 0
    """Epochs between checkpoints, the two last are kept; 0 for none but those of select_on."""
    select_on: Literal["last", "validation", "test"] = "last"
    """The student of the run: that of the last step, or the one whose top-1 accuracy was best on the validation images,
    or on the test images. The last choice is the ABKD code's; it flatters the result, which says so."""

    @model_validator(mode="after")
    def _choices_to_select_from(self):
        if self.select_on != "last" and not self.validate_every_epochs:
            raise ValueError(f"select_on={self.select_on} chooses between validations; set validate_every_epochs=1")
        if self.select_on != "last" and self.save_every_epochs not in (0, self.validate_every_epochs):
            raise ValueError(
                f"select_on={self.select_on} saves at every validation; set save_every_epochs=0 or "
                f"{self.validate_every_epochs}, not {self.save_every_epochs}"
            )
        if self.schedule == "steps" and list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones={list(self.milestones)} must rise")
        return self

    @property
    def selected_on(self) -> str:
        return self.select_on


class ImageEvaluation(Section):
    batch_size: Count = 256
    temperature: Positive = 4.0
    """The second temperature at which the entropy is measured; the first is 1."""


class _Feature(Section):
    """Compares what a layer of the student gives with what a layer of the teacher gives."""

    student_layer: str = Field(min_length=1)
    """Its dotted name in the network, as fc or layer3.2; an unknown one is refused with those that are near."""
    teacher_layer: str = Field(min_length=1)
    student_side: Literal["input", "output"] = "input"
    """What the layer receives or what it gives; a map is averaged over the image."""
    teacher_side: Literal["input", "output"] = "input"
    weight: Positive = 1.0
    """Of the term in the loss."""


class CRD(_Feature):
    """Contrastive representation distillation."""

    kind: Literal["crd"]
    weight: Positive = 0.8
    dim: Count = 128
    """Of the embeddings."""
    num_negatives: Count = 16384
    temperature: Positive = 0.07
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    negatives: Literal["other_classes", "all"] = "other_classes"


class ITRD(_Feature):
    """Information-theoretic representation distillation."""

    kind: Literal["itrd"]
    corr_weight: NonNegative = 2.0
    mutual_weight: NonNegative = 1.0
    order: Positive = 1.5
    mutual_in: Literal["purity", "bits"] = "purity"


class ImageObjective(Objective):
    features: tuple[Annotated[CRD | ITRD, Field(discriminator="kind")], ...] = ()
    """Terms on layers of student and teacher, added to the loss; in one process only."""


class ImageRecipe(Recipe):
    task: Literal["image_classification"]
    teacher: ImageTeacher | None = None
    """None trains on the labels alone: a teacher, or a baseline."""
    student: ImageStudent
    data: ImageData
    objective: ImageObjective
    training: ImageTraining
    evaluation: ImageEvaluation = ImageEvaluation()

    @model_validator(mode="after")
    def _a_teacher_where_one_is_needed(self):
        if self.teacher is None and (self.objective.kd_weight > 0 or self.objective.features):
            raise ValueError(
                "there is no teacher; set teacher.kind and its path, or to train on labels alone "
                "objective.kd_weight=0 objective.ce_weight=1 objective.features=[]"
            )
        if isinstance(self.teacher, CachedClassifier) and self.objective.features:
            raise ValueError(
                "objective.features are of a teacher's layers, and teacher.kind=cached has none; set it to [], or give "
                "the teacher itself"
            )
        if self.teacher and not (self.teacher.path or getattr(self.teacher, "pretrained", False)):
            raise ValueError("teacher.path is empty, and random weights teach nothing; give its weights")
        return self

    @model_validator(mode="after")
    def _validation_images_to_select_on(self):
        if self.training.select_on == "validation" and not self.data.num_validation:
            raise ValueError("training.select_on=validation needs images set aside; set data.num_validation above 0")
        return self

    @model_validator(mode="after")
    def _clip_where_it_can_be(self):
        if self.student.kind == "clip" and self.teacher and self.teacher.kind != "clip":
            raise ValueError(
                f"student.kind=clip takes the text features of its teacher, and teacher.kind={self.teacher.kind} has "
                "none; set teacher.kind=clip"
            )
        if self.objective.features and "clip" in (self.student.kind, self.teacher and self.teacher.kind):
            raise ValueError("objective.features are of networks with maps, not of kind=clip; set it to []")
        return self

    @model_validator(mode="after")
    def _labels_of_a_clip_set(self):
        calibration = self.objective.calibration
        if not self.data.clip_set or self.data.labels == "base":
            return self
        if self.objective.ce_weight > 0:
            raise ValueError(
                f"objective.ce_weight={self.objective.ce_weight:g} needs labels, and data.labels=none trains without; "
                "set it to 0, or to train on the base classes data.labels=base"
            )
        if calibration is not None and calibration.kind == "dkd":
            raise ValueError(
                "objective.calibration.kind=dkd needs the label of every image, and data.labels=none trains without; "
                "take another calibration, or data.labels=base"
            )
        return self

    @model_validator(mode="after")
    def _labels_where_they_are_needed(self):
        calibration = self.objective.calibration
        if self.data.num_labelled_per_class and calibration is not None and calibration.kind == "dkd":
            raise ValueError(
                f"objective.calibration.kind=dkd needs the label of every image, and data.num_labelled_per_class="
                f"{self.data.num_labelled_per_class} takes labels away; set it to 0, or take another calibration"
            )
        asking = [each for each in self.objective.features if getattr(each, "negatives", "") == "other_classes"]
        if self.data.num_labelled_per_class and asking:
            raise ValueError(
                "objective.features: negatives=other_classes needs the label of every image, and "
                f"data.num_labelled_per_class={self.data.num_labelled_per_class} takes labels away; set negatives=all"
            )
        return self
