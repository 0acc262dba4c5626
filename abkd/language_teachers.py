"""The teacher's section of a language model's recipe -> the teacher, and the tokenizer that it reads with."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abkd import config
from abkd.data.batches import num_tokens
from abkd.data.instructions import Example
from abkd.divergences import Divergence
from abkd.divergences.top_k import degree
from abkd.errors import InputError
from abkd.models.adapters import merge_adapter
from abkd.models.pretrained import load_model, load_tokenizer, load_tokenizer_folder
from abkd.parts import make_objective
from abkd.paths import find_path
from abkd.teachers.cache.manifest import MANIFEST, TOKENIZER, Manifest, digest_of
from abkd.teachers.cached import CachedTeacher
from abkd.teachers.in_process import InProcessTeacher
from abkd.teachers.mixture import MixtureTeacher
from abkd.teachers.served import ServedTeacher
from abkd.teachers.teacher import Teacher
from abkd.vocab import check_same_vocabulary

API_KEY = "ABKD_API_KEY"
"""Environment variable with the key of a served teacher."""
CHECKED = 8
"""Examples that a server is asked to tokenize before the training."""
OF_TEXTS = (
    *("prompt_format", "max_prompt_tokens", "max_tokens", "long_prompts", "train", "subset", "split"),
    *("validation", "validation_split", "num_held_out", "max_train_rows", "max_validation_rows"),
)
"""Fields of a recipe's data that decide which token ids the examples have."""


def tokenizer_of(recipe: config.LanguageRecipe) -> PreTrainedTokenizerBase:
    """The teacher's, the first one's of a mixture, or without a teacher the student's own."""
    for section in recipe.teachers:
        return _tokenizer(section, recipe, "teacher" if len(recipe.teachers) == 1 else "teacher.teachers.0")
    return load_tokenizer(recipe.student.path, "student.path")


def _tokenizer(section: Any, recipe: config.LanguageRecipe, field: str) -> PreTrainedTokenizerBase:
    match section:
        case config.InProcess(path=path):
            return load_tokenizer(path, f"{field}.path")
        case config.Cached(path=path):
            return cached_tokenizer(find_path(path, f"{field}.path"), f"{field}.path")
    return load_tokenizer(section.tokenizer or recipe.student.path, f"{field}.tokenizer")


def cached_tokenizer(folder: Path, field: str) -> PreTrainedTokenizerBase:
    manifest = Manifest.read(folder, field)
    tokenizer = load_tokenizer_folder(folder / TOKENIZER, field)
    if tokenizer_digests(tokenizer) != manifest.tokenizer:
        raise InputError(
            f"{field}: the tokenizer in {folder / TOKENIZER} was altered, it is not that of {folder / MANIFEST}; write "
            "the cache again"
        )
    return tokenizer


def tokenizer_digests(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Of what decides token ids, as a cache's manifest has it."""
    return {
        "vocabulary": digest_of([tokenizer.get_vocab(), tokenizer.eos_token_id]),
        "chat_template": digest_of(tokenizer.chat_template),
    }


def make_teacher(
    recipe: config.LanguageRecipe,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    say: Callable[[str], None],
) -> Teacher:
    """The recipe's teacher; of a cache one that knows where each example stands."""
    if not isinstance(recipe.teacher, config.Mixture):
        return _make(recipe.teacher, recipe, tokenizer, examples, say, "teacher")
    teachers = []
    for index, section in enumerate(recipe.teachers):
        field = f"teacher.teachers.{index}"
        if index:
            own = _tokenizer(section, recipe, field)
            check_same_vocabulary(student=own, teacher=tokenizer, names=(field, "teacher.teachers.0"))
        teachers.append(_make(section, recipe, tokenizer, examples, say, field))
    return MixtureTeacher(teachers, recipe.teacher.weights)


def _make(section, recipe, tokenizer, examples, say, field: str) -> Teacher:
    match section:
        case config.InProcess():
            say(f"loading the teacher {section.path}")
            model = load_teacher(section, field)
            return InProcessTeacher(model, remember=section.remember, pack=recipe.training.pack)
        case config.Cached():
            return _open_cache(section, recipe, examples, say, f"{field}.path")
        case config.Served():
            return _call_server(section, tokenizer, examples, say)
    raise AssertionError(section)


def _call_server(section: config.Served, tokenizer, examples: Sequence[Example], say) -> ServedTeacher:
    """Checked: the server is there, and reads what we read."""
    options = section.model_dump(exclude={"kind", "tokenizer"})
    vocab = max(tokenizer.get_vocab().values()) + 1
    teacher = ServedTeacher(**options, tokenizer=tokenizer, vocab=vocab, api_key=os.environ.get(API_KEY))
    longest = max(examples, key=num_tokens)
    for line in teacher.check([[*each.prompt_ids, *each.completion_ids] for each in [longest, *examples[:CHECKED]]]):
        say(line)
    return teacher


def _open_cache(section: config.Cached, recipe, examples, say, field: str) -> CachedTeacher:
    folder = find_path(section.path, field)
    teacher = CachedTeacher.open(folder, section.tail, field=field)
    manifest = teacher.store.manifest
    if manifest.targets["kind"] == "sampled" and recipe.objective.kd_weight > 0:
        divergence = make_objective(recipe.objective).at(1.0).divergence
        assert isinstance(divergence, Divergence)
        if degree(divergence) is None:
            raise InputError(
                f"objective.divergence.kind={divergence.kind} is no sum over classes, which a sample as in "
                f"{str(folder)!r} cannot serve; cache with --targets hidden or top_k"
            )
    teacher.expect(examples, texts_of(recipe))
    say(f"teacher: {manifest.described}, of {manifest.num_tokens:,} tokens, in {folder}")
    return teacher


def movable_models(recipe: config.LanguageRecipe, teacher: Teacher | None) -> list[PreTrainedModel]:
    """Of `teacher`, the recipe's: those that stand where they were loaded; a quantised one is on its device already."""
    pairs = zip(recipe.teachers, teacher.parts if teacher else (), strict=True)
    found = [part.model for section, part in pairs if getattr(section, "quantization", "none") == "none"]
    return [model for model in found if model is not None]


def texts_of(recipe: config.LanguageRecipe) -> dict[str, Any]:
    """What the examples are made of, as a cache's manifest has it."""
    data = recipe.data.model_dump(include=set(OF_TEXTS))
    return {f"data.{name}": data[name] for name in OF_TEXTS}


def load_teacher(section: config.InProcess, field: str = "teacher") -> PreTrainedModel:
    """With its adapter in its weights, or quantised."""
    model = load_model(section.path, f"{field}.path", section.dtype, section.quantization)
    return merge_adapter(model, section.adapter, f"{field}.adapter") if section.adapter else model
