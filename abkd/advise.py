"""Teacher and student looked at on some examples, without training: what divides them, and where to start."""

from typing import Any

import torch

from abkd import config
from abkd.analysis.advice import Advice, Overview, OverviewMeter, advise
from abkd.data.batches import Collator, batches_by_length
from abkd.errors import InputError
from abkd.evaluation.fidelity import fidelity
from abkd.setup import Say
from abkd.tasks import images, language
from abkd.trainer.images import all_logits


def look(recipe: config.Recipe, inputs: Any, say: Say, num_examples: int) -> tuple[Overview, Advice]:
    """Runs both models on `num_examples` training examples, validation ones where those are fewer.

    Raises:
        InputError: the recipe has no teacher, or of images none that is loaded.
    """
    if recipe.teacher is None:
        raise InputError("teacher: there is none to compare with; set one in the recipe")
    meter = OverviewMeter()
    if isinstance(recipe, config.ImageRecipe):
        _look_at_images(recipe, inputs, say, num_examples, meter)
    else:
        assert isinstance(recipe, config.LanguageRecipe)
        _look_at_texts(recipe, inputs, say, num_examples, meter)
    overview = meter.result()
    return overview, advise(overview)


def _look_at_texts(
    recipe: config.LanguageRecipe, inputs: Any, say: Say, num_examples: int, meter: OverviewMeter
) -> None:
    setup = language.prepare(recipe, inputs._replace(train=inputs.train[:num_examples], sets={}), say)
    student = language.make_student(recipe, setup, say)
    assert setup.teacher is not None
    if known_by := setup.teacher.approximation:
        say(
            f"teacher: its rows are not whole ({known_by}), and the rest is taken as spread evenly: do not trust what "
            "is said of small alpha and of the tail; cache hidden states for that"
        )
    examples = setup.train or setup.validation
    batches = batches_by_length(examples, Collator.of(setup.tokenizer), recipe.evaluation.batch_size)
    fidelity(student, setup.teacher.targets, batches, {}, per_token=meter)


@torch.no_grad()
def _look_at_images(recipe: config.ImageRecipe, inputs: Any, say: Say, num_examples: int, meter: OverviewMeter) -> None:
    images.check_teacher_loads(recipe)
    some = inputs.train.at(slice(num_examples))
    setup = images.prepare(recipe, inputs._replace(train=some, is_labelled=inputs.is_labelled[:num_examples]), say)
    size = recipe.evaluation.batch_size
    models = images.make_student(recipe, setup, say), images.loaded_teacher(setup)
    rows = [all_logits(model.eval(), setup.train, size).log_softmax(-1) for model in models]
    for student, teacher in zip(*(each.split(size) for each in rows), strict=True):
        meter(student, teacher)
