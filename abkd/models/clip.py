"""Image classifiers out of CLIP: a prompted teacher, the model that trains its prompts, PromptKD's student.

Each is called with images `[batch, 3, H, W]` in 0 to 1, not normalised, and gives logits `[batch, classes]`: the cosine
of an image's and a class's features times CLIP's logit scale. CLIP's own weights stay frozen in all of them.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, CLIPConfig, CLIPModel

from abkd.errors import InputError
from abkd.models.clip_files import PROMPTS, Prompts, check_fingerprint, fingerprint, read, write
from abkd.models.clip_prompts import PromptedText, PromptedVision, check_context
from abkd.models.pretrained import find_model

STUDENT = "clip_student"
FROZEN = re.compile(r"(vision|text)\.(tower|to_shared)\.")
"""Names of CLIP's own weights in a classifier's state."""


def load_clip(path: str, field: str) -> CLIPModel:
    """The CLIP at `path`, a folder or a hub id, in fp32 and evaluation mode.

    Raises:
        InputError: it cannot be read, or is no whole CLIP.
    """
    found = find_model(path, field)
    name = str(found or path)
    options: dict[str, Any] = {"local_files_only": found is not None}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        if not isinstance(config, CLIPConfig):
            raise InputError(f"{field}: {path!r} is a {config.model_type}, not a clip; give a whole CLIP model")
        options |= {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
        clip, report = CLIPModel.from_pretrained(name, config=config, **options)
    except InputError:
        raise
    except Exception as error:  # nothing of ours runs in there: whatever it is, it is about these files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
        raise InputError(f"{field}: CLIPModel cannot load {path!r}: {reason}; give a whole CLIP model") from error
    random = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if random:
        raise InputError(
            f"{field}: {path!r} lacks {len(random):,} weights of a CLIP, or has them in another size, first "
            f"{random[0]}; give a whole CLIP model"
        )
    return clip.eval()


class CLIPTeacher(nn.Module):
    """logits = scale * unit(vision(pixel_values)) @ text_features.T; nothing is trained.

    Args:
        clip: frozen in place.
        text_features: `[classes, dim]` unit vectors, as `text_features` makes them.
        vision_prompts: `[depth, tokens, width]`.
    """

    text_features: Tensor
    scale: Tensor

    def __init__(self, clip: CLIPModel, text_features: Tensor, vision_prompts: Tensor):
        super().__init__()
        self.vision = PromptedVision(clip, vision_prompts).requires_grad_(False)
        self.register_buffer("text_features", text_features.detach())
        self.register_buffer("scale", clip.logit_scale.detach().exp())

    def forward(self, pixel_values: Tensor) -> Tensor:
        return cosine_logits(unit(self.vision(pixel_values)), self.text_features, self.scale)


class PromptedClassifier(nn.Module):
    """What of a classifier is worth keeping: CLIP's own weights are not."""

    def save(self, folder: Path) -> None:
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        raise NotImplementedError

    def trained_state(self) -> dict[str, Tensor]:
        """The state without CLIP's own weights: prompts, projection, buffers."""
        return {name: each for name, each in self.state_dict().items() if not FROZEN.match(name)}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Takes up what `trained_state` gave. Raises RuntimeError where names or shapes are others."""
        self.load_state_dict(state | {name: each for name, each in self.state_dict().items() if FROZEN.match(name)})


class PromptedCLIP(PromptedClassifier):
    """logits = scale * unit(vision(pixel_values)) @ unit(text(sentences)).T, with gradients to the prompts of both.

    Trained with cross-entropy on labelled images of the base classes it becomes a teacher: `prompts`, then
    `CLIPTeacher`, which computes the text features once.

    Args:
        clip: frozen in place.
        prompts: to start from, as of `initial_vision` and `initial_text`; copied.
        token_ids: `[classes, length]`, a sentence per class (see `tokenize`).
        num_base: while it is trained there are the first `num_base` classes alone; None for all.

    Source: Khattak et al., "Self-regulating prompts" (PromptSRC), ICCV 2023; its regularisers are in
        `abkd.models.promptsrc`.
    """

    token_ids: Tensor
    scale: Tensor

    def __init__(self, clip: CLIPModel, prompts: Prompts, token_ids: Tensor, num_base: int | None = None):
        super().__init__()
        check_context(token_ids, prompts.text.shape[1])
        self.num_base = num_base
        self.vision = PromptedVision(clip, prompts.vision)
        self.text = PromptedText(clip, prompts.text)
        self.register_buffer("token_ids", token_ids)
        self.register_buffer("scale", clip.logit_scale.detach().exp())

    def features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of the images `[batch, dim]` and of the classes `[classes, dim]`, base ones while trained."""
        token_ids = self.token_ids[: self.num_base] if self.training else self.token_ids
        return unit(self.vision(pixel_values)), unit(self.text(token_ids))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return cosine_logits(*self.features(pixel_values), self.scale)

    def prompts(self) -> Prompts:
        """A copy of the prompts as they are now."""
        return Prompts(self.vision.prompts.detach().clone(), self.text.prompts.detach().clone())

    def save(self, folder: Path) -> None:
        """Writes what `save_prompts` writes, for `load_prompts`."""
        towers = self.vision.tower, self.vision.to_shared, self.text.tower, self.text.to_shared
        tensors: dict[str, Tensor] = {"vision": self.vision.prompts, "text": self.text.prompts}
        write(folder, PROMPTS, tensors, {"clip": fingerprint(*towers)})

    def load(self, folder: Path) -> None:
        """Takes up what `save` wrote."""
        tensors, _ = read(folder, PROMPTS, "student")
        self.load_trained_state(self.trained_state() | {f"{name}.prompts": each for name, each in tensors.items()})


class PromptKDStudent(PromptedClassifier):
    """logits = scale * unit(projection(vision(pixel_values))) @ text_features.T, against the teacher's text features.

    Prompts and projection are trained. The projection is Linear, BatchNorm, ReLU, Linear, from the student's shared
    space into the teacher's. `scale` and `text_features` are the teacher's; PromptKD takes the scale of the student's
    CLIP, which is the same number, 100, in all that OpenAI published.

    Args:
        clip: the student's CLIP, frozen in place.
        vision_prompts: `[depth, tokens, width]`, as `initial_vision` makes them.
        text_features: `[classes, dim]` of the teacher.
        scale: of the teacher.
        class_names: of the rows of `text_features`, saved beside the weights; may be left out.

    Source: Li et al., "PromptKD: Unsupervised prompt distillation for vision-language models", CVPR 2024.
    """

    text_features: Tensor
    scale: Tensor

    def __init__(
        self,
        clip: CLIPModel,
        vision_prompts: Tensor,
        text_features: Tensor,
        scale: Tensor,
        class_names: Sequence[str] = (),
    ):
        super().__init__()
        if class_names and len(class_names) != len(text_features):
            raise InputError(f"class_names: {len(class_names)} for {len(text_features)} classes; give one a class")
        dim = text_features.shape[1]
        self.class_names = tuple(class_names)
        self.vision = PromptedVision(clip, vision_prompts)
        self.projection = nn.Sequential(
            nn.Linear(clip.visual_projection.out_features, dim), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, dim)
        )
        self.register_buffer("text_features", text_features.detach().clone())
        self.register_buffer("scale", scale.detach().clone())

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Raises InputError for a single image while it is trained: a batch of one has no batch statistics."""
        if self.training and len(pixel_values) == 1:
            raise InputError(
                "training.batch_size: 1 image has no batch statistics; use 2 or more, without a last batch of 1"
            )
        return cosine_logits(unit(self.projection(self.vision(pixel_values))), self.text_features, self.scale)

    def save(self, folder: Path) -> None:
        """Writes `clip_student.safetensors`, the trained state, and `clip_student.json` into `folder`."""
        record = {
            "clip": fingerprint(self.vision.tower, self.vision.to_shared),
            "num_tokens": self.vision.prompts.shape[1],
            "depth": len(self.vision.prompts),
            "class_names": list(self.class_names),
        }
        write(Path(folder), STUDENT, self.trained_state(), record)

    def load(self, folder: Path) -> None:
        """Takes up what `save` wrote."""
        self.load_trained_state(read(folder, STUDENT, "student")[0])


def load_clip_student(folder: str | Path, clip: CLIPModel, field: str = "student.path") -> PromptKDStudent:
    """The student that `PromptKDStudent.save` wrote, bit by bit, in evaluation mode.

    Args:
        clip: the student's CLIP, the one it was trained on.

    Raises:
        InputError: it is missing, torn or was trained on another CLIP.
    """
    state, record = read(Path(folder), STUDENT, field)
    origin = f"{field}: {str(folder)!r}"
    check_fingerprint(record, clip.vision_model, clip.visual_projection, origin=origin)
    try:
        shapes = state["vision.prompts"], state["text_features"], state["scale"]
        student = PromptKDStudent(clip, *shapes, class_names=record.get("class_names", ()))
        student.load_trained_state(state)
    except (LookupError, RuntimeError) as error:
        reason = json.dumps(str(error).splitlines()[-1].strip())
        raise InputError(f"{origin} holds no whole student ({reason}); copy the folder again") from None
    return student.eval()


@torch.no_grad()
def text_features(clip: CLIPModel, text_prompts: Tensor, token_ids: Tensor, batch_size: int = 256) -> Tensor:
    """unit(text(sentences)), `[classes, dim]`, computed once for all classes.

    Args:
        clip: frozen in place.
        text_prompts: `[depth, tokens, width]`; with no tokens, zero-shot CLIP's.
        token_ids: `[classes, length]`, a sentence per class (see `tokenize`).
        batch_size: sentences at a time.
    """
    check_context(token_ids, text_prompts.shape[1])
    text = PromptedText(clip, text_prompts)
    return torch.cat([unit(text(part)) for part in token_ids.split(batch_size)])


def cosine_logits(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """scale * image @ text.T, `[batch, classes]` of unit vectors; rounded as transformers' CLIPModel does."""
    return scale * (text @ image.T).T


def unit(features: Tensor) -> Tensor:
    """features / |features|_2 of each row; NaN for a row of zeros."""
    return features / features.square().sum(dim=-1, keepdim=True).sqrt()


def restrict(logits: Tensor, classes: range | Sequence[int]) -> Tensor:
    """logits[:, classes]: what is left to choose from when the class is known to be one of these."""
    return logits[:, list(classes)]


def accuracy_among(logits: Tensor, labels: Tensor, classes: range) -> float:
    """Share, 0 to 1, of the images of `classes` whose highest logit among `classes` is their label's; NaN for none.

    With `abkd.data.clip_sets.base_and_new`, the accuracy on the base classes or on the new ones.
    """
    chosen = (labels >= classes.start) & (labels < classes.stop)
    best = restrict(logits[chosen], classes).argmax(dim=-1) + classes.start
    return float((best == labels[chosen]).double().mean())
