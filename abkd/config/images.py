"""The recipe of an image classifier."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from abkd.config.fields import Count, CountOrZero, NonNegative, Positive, Recipe, Section
from abkd.config.objective import Objective
from abkd.config.training import Training

Channels = tuple[float, float, float]
CIFAR_100_MEAN, CIFAR_100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


class ClassifierSection(Section):
    """What networks of all kinds have."""

    mean: Channels | None = None
    """Of red, green and blue in 0 to 1, subtracted from the images. None is what the model's folder says, or for cifar
    that of CIFAR-100's training images."""
    std: Channels | None = None
    """Divides the images after that; likewise."""
    size: CountOrZero = 0
    """Images are resized to size x size for this model; 0 takes what its folder says, or them as they are."""
    new_head: bool = False
    """Where the weights at path have other classes than the data, start from a new last layer; refused otherwise."""


class CifarNetwork(ClassifierSection):
    """A network for small images, of `abkd.models.cifar`."""

    kind: Literal["cifar"]
    name: str = ""
    """As resnet20, wrn_40_2, vgg8. Empty where path is a student's folder, which says it."""
    path: str = ""
    """Its weights: a student's folder or a state dict (.pth, .pt, .th, .safetensors). Empty starts from random ones,
    of training.seed."""


class PretrainedClassifier(ClassifierSection):
    """An image classifier of transformers."""

    kind: Literal["pretrained"]
    path: str = Field(min_length=1)
    """A folder, or a hub id."""


class TimmNetwork(ClassifierSection):
    """A model of timm, which must be installed."""

    kind: Literal["timm"]
    name: str = ""
    """As timm lists it. Empty where path is a student's folder."""
    path: str = ""
    """As for cifar."""
    pretrained: bool = False
    """Download timm's own weights."""


class _Remembering(Section):
    remember: bool = False
    """Keep the teacher's logits of every augmented image in main memory: for several students on one data set, as in a
    search."""


class CifarTeacher(CifarNetwork, _Remembering):
    """As a student, with its weights."""


class PretrainedTeacher(PretrainedClassifier, _Remembering):
    """As a student."""


class TimmTeacher(TimmNetwork, _Remembering):
    """As a student, with its weights."""


ImageTeacher = Annotated[CifarTeacher | PretrainedTeacher | TimmTeacher, Field(discriminator="kind")]
ImageModel = Annotated[CifarNetwork | PretrainedClassifier | TimmNetwork, Field(discriminator="kind")]


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

    @model_validator(mode="after")
    def _a_share(self):
        if self.scale and not self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={list(self.scale)} must rise and end at 1 or below")
        return self


class ImageData(Section):
    train: str = Field(min_length=1)
    """Images: the folder of CIFAR's python version, a folder CLASS/IMAGE or SPLIT/CLASS/IMAGE, mosaics, Parquet, .npz,
    or the hub id owner/name of a data set. docs/images.md has them all."""
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
    """Train on so many images of each class; 0 for all."""
    num_labelled_per_class: CountOrZero = 0
    """So many training images of each class keep their label, the others count for the divergence alone; 0 for all."""
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """Skipped ones are counted."""
    augmentation: Augmentation = Augmentation()


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
    student: ImageModel
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
        if self.teacher and not (self.teacher.path or getattr(self.teacher, "pretrained", False)):
            raise ValueError("teacher.path is empty, and random weights teach nothing; give its weights")
        return self

    @model_validator(mode="after")
    def _validation_images_to_select_on(self):
        if self.training.select_on == "validation" and not self.data.num_validation:
            raise ValueError("training.select_on=validation needs images set aside; set data.num_validation above 0")
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
