"""Rows of a recipe's own teacher and student, for `abkd explore`."""

from collections.abc import Sequence
from typing import Any

import torch

from abkd import config
from abkd.data.batches import Collator
from abkd.errors import InputError
from abkd.explore import Row, rows_of
from abkd.head import completion_logits
from abkd.objective import completion_mask
from abkd.setup import Say
from abkd.tasks import images, language
from abkd.trainer.images import all_logits

SHOWN_CHARACTERS = 40
"""Of a prompt's end, in the name of a row."""


@torch.no_grad()
def rows_of_recipe(recipe: config.Recipe, inputs: Any, say: Say, num_rows: int = 12) -> list[Row]:
    """The first `num_rows` training examples: of a text the first token of its completion, of an image its class.

    Raises:
        InputError: the recipe has no teacher, or of images none that is loaded.
    """
    if recipe.teacher is None:
        raise InputError("teacher: there is none to show; set one in the recipe")
    if isinstance(recipe, config.ImageRecipe):
        images.check_teacher_loads(recipe)
        some = inputs._replace(train=inputs.train.at(slice(num_rows)), is_labelled=inputs.is_labelled[:num_rows])
        setup = images.prepare(recipe, some, say)
        models = images.make_student(recipe, setup, say).eval(), images.loaded_teacher(setup)
        student, teacher = (all_logits(model, setup.train, num_rows) for model in models)
        classes: Sequence[str] = setup.train.classes
        names = [f"image {number}: {classes[label]}" for number, label in enumerate(setup.train.labels.clamp(min=0))]
        return rows_of(student_logits=student, teacher_logits=teacher, names=names, label_of=classes.__getitem__)
    assert isinstance(recipe, config.LanguageRecipe)
    texts = language.prepare(recipe, inputs._replace(train=inputs.train[:num_rows], sets={}), say)
    shrunk = language.make_student(recipe, texts, say).eval()
    batch = Collator.of(texts.tokenizer)(texts.train)
    counted = completion_mask(batch["labels"])
    batch["mask"] = counted & (counted.cumsum(1) == 1)  # the first token of each completion
    given: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask", "mask")}
    student = completion_logits(shrunk, **given)
    assert texts.teacher is not None
    teacher = texts.teacher.targets(**given, example_ids=batch["example_ids"]).logits(0, len(student))
    decode = texts.tokenizer.decode
    prompts = [decode(example.prompt_ids, skip_special_tokens=True).split() for example in texts.train]
    return rows_of(
        student_logits=student,
        teacher_logits=teacher,
        names=[f"{number}: …{' '.join(words)[-SHOWN_CHARACTERS:]}" for number, words in enumerate(prompts, start=1)],
        label_of=lambda token: decode([token]),
    )
