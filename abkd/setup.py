"""A recipe and its inputs -> tokenizer, examples, teacher and student, loaded."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from abkd import config
from abkd.data.batches import num_tokens
from abkd.data.corpus import read_blocks
from abkd.data.instructions import EncodingCounts, Example, encode
from abkd.errors import InputError
from abkd.evaluation.sets import EvaluationSet
from abkd.fit import say_memory
from abkd.inputs import Inputs
from abkd.language_teachers import make_teacher, tokenizer_of
from abkd.models.adapters import merge_adapter
from abkd.models.pretrained import load_model, load_tokenizer
from abkd.models.students import shrink
from abkd.parts import freeze, with_lora
from abkd.paths import find_path
from abkd.teachers.teacher import Teacher
from abkd.vocab import align_widths, check_same_vocabulary

Say = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """What runs of one teacher on one data set share."""

    teacher: Teacher | None
    tokenizer: PreTrainedTokenizerBase
    train: list[Example]
    validation: list[Example]
    sets: dict[str, EvaluationSet] = field(default_factory=dict)
    corpus: Tensor | None = None
    """`[num_blocks, block_tokens]`"""


def prepare(recipe: config.LanguageRecipe, inputs: Inputs, say: Say, to_train: bool = False) -> Setup:
    """Loads the teacher and tokenises the data; `to_train`: says first what memory a training step needs."""
    tokenizer = tokenizer_of(recipe)
    options = recipe.data.model_dump(include={"prompt_format", "max_prompt_tokens", "max_tokens", "long_prompts"})
    train, train_counts = encode(inputs.train, tokenizer, **options)
    validation, validation_counts = encode(inputs.validation, tokenizer, **options, first_id=len(train))
    say(f"train: {_describe(train_counts)}")
    say(f"validation: {_describe(validation_counts)}")
    sets = {}
    for name, rows in inputs.sets.items():
        examples, counts = encode(rows, tokenizer, **options)
        say(f"{name}: {_describe(counts)}")
        references = [example.references or (example.completion,) for example in examples]
        prompts = [example.prompt for example in examples]
        sets[name] = EvaluationSet(prompts, references, recipe.evaluation.sets[name].metric)
    corpus = None
    if to_train:
        if recipe.data.corpus:
            corpus = _read_corpus(recipe, tokenizer, say)
        say_memory(recipe, say, train)
    teacher = None
    if recipe.teacher is not None:
        teacher = make_teacher(recipe, tokenizer, [*train, *validation], say)
    return Setup(teacher, tokenizer, train, validation, sets, corpus)


def _read_corpus(recipe: config.LanguageRecipe, tokenizer: PreTrainedTokenizerBase, say: Say) -> Tensor:
    """As many blocks as the steps need, or all where epochs decide."""
    options, size = recipe.training, recipe.data.corpus_tokens
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    needed = options.num_steps * options.accumulation * options.batch_size * ranks
    blocks, num_left = read_blocks(find_path(recipe.data.corpus, "data.corpus"), "data.corpus", tokenizer, size, needed)
    say(f"corpus: {len(blocks):,} blocks of {size:,} tokens, {num_left:,} tokens left over")
    return blocks


def make_student(recipe: config.LanguageRecipe, setup: Setup, say: Say) -> PreTrainedModel:
    """The student before training, with the teacher's vocabulary: refused, or the wider of the two cut, if not."""
    set_seed(recipe.training.seed)
    section, teacher = recipe.student, setup.teacher
    if section.path and teacher is not None:
        check_same_vocabulary(student=load_tokenizer(section.path, "student.path"), teacher=setup.tokenizer)
    match section:
        case config.Shrink(path=path):
            source = load_model(path, "student.path") if path else teacher and teacher.model
            student = shrink(source, section.layers or section.keep_layers).float()
        case config.Pretrained(path=path, adapter=adapter):
            student = load_model(path, "student.path")
            if adapter:
                student = merge_adapter(student, adapter, "student.adapter")
    if teacher is not None and (line := align_widths(student=student, teacher=teacher, tokenizer=setup.tokenizer)):
        say(line)
    _check_context(recipe, setup, "student", student)
    for part in teacher.parts if teacher is not None else ():
        if part.model is not None:
            _check_context(recipe, setup, "teacher", part.model)
    freeze(student, recipe.student)
    return with_lora(student, recipe.student.lora)


def _check_context(recipe: config.LanguageRecipe, setup: Setup, name: str, model: PreTrainedModel) -> None:
    """Refuses texts that are longer than the model has positions."""
    context: int | None = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        return
    lengths = {"data.max_tokens": max(map(num_tokens, [*setup.train, *setup.validation]))}
    if recipe.data.corpus:
        lengths["data.corpus_tokens"] = recipe.data.corpus_tokens
    if recipe.rollouts.kind != "fixed":
        longest = max(len(example.prompt_ids) for example in setup.train)
        lengths["rollouts.max_new_tokens"] = longest + recipe.rollouts.max_new_tokens
    asked = setup.validation[: recipe.evaluation.num_generated]
    prompts = [len(example.prompt_ids) for example in asked]
    for each in setup.sets.values():
        prompts += [len(setup.tokenizer(text, verbose=False)["input_ids"]) for text in each.prompts]
    if prompts:
        lengths["evaluation.max_new_tokens"] = max(prompts) + recipe.evaluation.max_new_tokens
    for option, length in lengths.items():
        if length > context:
            raise InputError(
                f"{option}: the longest text has {length:,} tokens with its prompt, and the {name} has "
                f"{context:,} positions; lower {option}"
            )


def _describe(counts: EncodingCounts) -> str:
    return (
        f"{counts.num_examples:,} examples, {counts.num_tokens:,} completion tokens, "
        f"{counts.num_completions_cut:,} completions cut, {counts.num_long_prompts_dropped:,} long prompts dropped"
    )
