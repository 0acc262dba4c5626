"""Classifiers out of CLIP, as a recipe describes them: a prompted teacher, the student that is trained."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from abkd.config.image_models import CLIPStudent as StudentSection
from abkd.config.image_models import CLIPTeacher as TeacherSection
from abkd.data.clip_sets import CONTEXT, sentences
from abkd.errors import InputError
from abkd.models.clip import (
    CLIPTeacher,
    PromptedClassifier,
    PromptedCLIP,
    PromptKDStudent,
    load_clip,
    load_clip_student,
    text_features,
)
from abkd.models.clip_files import Prompts, load_prompts
from abkd.models.clip_prompts import initial_text, initial_vision, tokenize
from abkd.models.pretrained import load_tokenizer


def make_teacher(section: TeacherSection, classes: Sequence[str], template: str) -> CLIPTeacher:
    """With its prompts, or without any zero-shot CLIP, which takes the `template`."""
    clip = load_clip(section.path, "teacher.path")
    ids = _token_ids(clip, section.path, "teacher.path", sentences(classes, CONTEXT if section.prompts else template))
    if section.prompts:
        prompts = load_prompts(section.prompts, clip, "teacher.prompts")
    else:
        prompts = Prompts(initial_vision(clip, 0, 1), initial_text(clip, ids, 0, 1))
    return CLIPTeacher(clip, text_features(clip, prompts.text, ids), prompts.vision)


def make_student(
    section: StudentSection, classes: Sequence[str], teacher: nn.Module | None, *, num_base: int | None, seed: int
) -> PromptedClassifier:
    """A student of a CLIP teacher, or without one the prompts of both towers; in evaluation mode.

    Args:
        num_base: the first classes, which alone are there while prompts of both towers are trained; None for all.
        seed: of prompts and projection where `section.prompts` is empty.
    """
    clip = load_clip(section.path, "student.path")
    if not section.prompts:
        _check_depth(section, clip)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if teacher is None:
            return _prompted(section, clip, classes, num_base).eval()
        assert isinstance(teacher, CLIPTeacher)  # the recipe was checked
        if section.prompts:
            return _saved(section, clip, classes)
        vision = initial_vision(clip, section.num_tokens, section.depth)
        return PromptKDStudent(clip, vision, teacher.text_features, teacher.scale, classes).eval()


def _prompted(
    section: StudentSection, clip: CLIPModel, classes: Sequence[str], num_base: int | None
) -> PromptedClassifier:
    ids = _token_ids(clip, section.path, "student.path", sentences(classes))
    if section.prompts:
        prompts = load_prompts(section.prompts, clip, "student.prompts")
    else:
        shape = section.num_tokens, section.depth
        prompts = Prompts(initial_vision(clip, *shape), initial_text(clip, ids, *shape))
    return PromptedCLIP(clip, prompts, ids, num_base)


def _saved(section: StudentSection, clip: CLIPModel, classes: Sequence[str]) -> PromptedClassifier:
    student = load_clip_student(section.prompts, clip, "student.prompts")
    if student.class_names != tuple(classes):
        raise InputError(
            f"student.prompts: {section.prompts!r} was trained for {len(student.class_names)} classes from "
            f"{student.class_names[:1]} on, and the data has {len(classes)} from {tuple(classes[:1])} on; give a "
            "student of this set"
        )
    return student


def _token_ids(clip: CLIPModel, path: str, field: str, texts: Sequence[str]) -> Tensor:
    return tokenize(clip, load_tokenizer(path, field), texts)


def _check_depth(section: StudentSection, clip: CLIPModel) -> None:
    layers = min(clip.config.vision_config.num_hidden_layers, clip.config.text_config.num_hidden_layers)
    if section.depth > layers:
        raise InputError(f"student.depth={section.depth}: {section.path!r} has {layers} layers; lower it")
