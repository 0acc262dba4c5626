"""Teachers and students of an image classifier's recipe."""

from typing import Annotated, Literal

from pydantic import Field

from abkd.config.fields import Count, CountOrZero, Section

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


class CLIPSection(Section):
    kind: Literal["clip"]
    path: str = Field(min_length=1)
    """A whole CLIP of transformers: a folder, or a hub id as openai/clip-vit-base-patch16. It stays as it is."""


class CLIPStudent(CLIPSection):
    """Prompts of the vision tower and a projection, with a teacher of kind clip; without a teacher prompts of both
    towers, which make such a teacher."""

    prompts: str = ""
    """Start from the student's folder of a run; empty draws new ones of training.seed."""
    num_tokens: Count = 4
    """Prompts of each tower; for both towers at most the 4 of 'a photo of a'."""
    depth: Count = 9
    """Layers that have prompts of their own."""


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


class CLIPTeacher(CLIPSection, _Remembering):
    """With learned prompts, or zero-shot. The classes are told apart by their names."""

    prompts: str = ""
    """Of both towers: the student's folder of a run without a teacher, or a checkpoint of PromptSRC or PromptKD
    (.pth.tar). Empty is zero-shot CLIP, with the template of the data set."""


class CachedClassifier(Section):
    """What `abkd cache` wrote; the teacher itself is not loaded."""

    kind: Literal["cached"]
    path: str = Field(min_length=1)
    """The cache's folder."""


ImageTeacher = Annotated[
    CifarTeacher | PretrainedTeacher | TimmTeacher | CLIPTeacher | CachedClassifier, Field(discriminator="kind")
]
ImageModel = CifarNetwork | PretrainedClassifier | TimmNetwork
ImageStudent = Annotated[ImageModel | CLIPStudent, Field(discriminator="kind")]
