"""What a model is worth under a recipe: fidelity to the teacher, and answers."""

from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from abkd import config
from abkd.analysis.mass import RankMassMeter
from abkd.data.batches import Collator, batches_by_length
from abkd.evaluation.fidelity import fidelity
from abkd.evaluation.rouge import rouge_l
from abkd.generation import generate
from abkd.setup import Setup
from abkd.trainer import VALIDATION_DIVERGENCES


def measure_before(recipe: config.Recipe, setup: Setup, student: PreTrainedModel) -> dict[str, Any]:
    """What `measure` says of the teacher, if there is one, and of the untrained student."""
    teacher = {"teacher": measure(recipe, setup, setup.teacher.model)} if setup.teacher else {}
    return teacher | {"before": measure(recipe, setup, student)}


def measure(recipe: config.Recipe, setup: Setup, model: PreTrainedModel) -> dict[str, Any]:
    """Fidelity to the teacher on the validation data, and answers with their ROUGE-L if asked for.

    Keys: those of `fidelity`, `num_parameters`, with a teacher `rank_mass`, with answers `rouge_l` and `answers`.
    """
    meter = RankMassMeter()
    size = recipe.evaluation.batch_size
    batches = batches_by_length(setup.validation, Collator.of(setup.tokenizer), size)
    num_batches = -(-len(setup.validation) // size)
    bar = tqdm(batches, total=num_batches, desc="measuring", unit="batch", leave=False)
    teacher_logits = None if setup.teacher is None else setup.teacher.logits
    result: dict[str, Any] = {
        **fidelity(model, teacher_logits, bar, VALIDATION_DIVERGENCES, per_token=meter),
        **({"rank_mass": meter.result()._asdict()} if setup.teacher else {}),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    asked = setup.validation[: recipe.evaluation.num_generated]
    if asked:
        result["answers"] = answer(recipe, setup, model)
        result["rouge_l"] = rouge_l(
            result["answers"], [example.references or [example.completion] for example in asked]
        )
    return result


def answer(recipe: config.Recipe, setup: Setup, model: PreTrainedModel) -> list[str]:
    """The model's answers to the first `evaluation.num_generated` validation prompts."""
    options = recipe.evaluation
    prompts = [example.prompt for example in setup.validation[: options.num_generated]]
    with tqdm(total=len(prompts), desc="answering", unit="prompt", leave=False) as bar:
        completions = generate(
            model,
            setup.tokenizer,
            prompts,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            batch_size=options.batch_size,
            seed=recipe.training.seed,
            progress=bar.update,
        )
    return [completion.text for completion in completions]
