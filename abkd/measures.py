"""What a model is worth under a recipe: fidelity to the teacher, and answers."""

from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from abkd import config, ranks
from abkd.analysis.mass import RankMassMeter
from abkd.data.batches import Collator, batches_by_length, num_batches
from abkd.evaluation.fidelity import fidelity
from abkd.evaluation.rouge import rouge_l
from abkd.evaluation.sets import evaluate_set
from abkd.generation import Sampling, generate
from abkd.head import unwrapped
from abkd.setup import Setup
from abkd.trainer import VALIDATION_DIVERGENCES


def measure_before(
    recipe: config.LanguageRecipe, setup: Setup, student: PreTrainedModel, keep: Path | None = None
) -> dict[str, Any]:
    """What `measure` says of the teacher, if it is a model in this process, and of the untrained student."""
    teacher = {}
    if setup.teacher is not None and setup.teacher.model is not None:
        teacher["teacher"] = measure(recipe, setup, setup.teacher.model, keep and keep / "teacher")
    return teacher | {"before": measure(recipe, setup, student, keep and keep / "before")}


def measure(
    recipe: config.LanguageRecipe, setup: Setup, model: PreTrainedModel, keep: Path | None = None
) -> dict[str, Any]:
    """Fidelity to the teacher on the validation data, answers with their ROUGE-L if asked for, the evaluation sets.

    Args:
        keep: a folder for the answers to the evaluation sets; those that are there are not made again.

    Returns:
        The keys of `fidelity`, `num_parameters`, with a teacher `rank_mass`, or `teacher_known_by` where its rows are
        not whole and a rank says nothing, with answers `rouge_l` and `answers`, with
        sets `sets`: name -> `evaluate_set`, and `sets_mean`, the mean of the sets' means.
    """
    meter = RankMassMeter()
    size = recipe.evaluation.batch_size
    batches = batches_by_length(setup.validation, Collator.of(setup.tokenizer), size)
    total = num_batches(setup.validation, size)
    bar = tqdm(batches, total=total, desc="measuring", unit="batch", leave=False, disable=not ranks.is_first())
    teacher_targets = None if setup.teacher is None else setup.teacher.targets
    known_by = setup.teacher.approximation if setup.teacher else ""
    result: dict[str, Any] = {
        **fidelity(model, teacher_targets, bar, VALIDATION_DIVERGENCES, per_token=meter),
        **({"rank_mass": meter.result()._asdict()} if setup.teacher and not known_by else {}),
        **({"teacher_known_by": known_by} if known_by else {}),
        "num_parameters": unwrapped(model).num_parameters(),
    }
    asked = setup.validation[: recipe.evaluation.num_generated]
    if asked:
        result["questions"] = [example.question for example in asked]
        result["answers"] = answer(recipe, setup, model)
        references = [example.references or [example.completion] for example in asked]
        result["rouge_l"] = fmean(rouge_l(result["answers"], references))
    if setup.sets:
        result["sets"] = {name: _measure_set(recipe, setup, model, name, keep) for name in setup.sets}
        result["sets_mean"] = fmean(each["mean"] for each in result["sets"].values())
    return result


def _measure_set(
    recipe: config.LanguageRecipe, setup: Setup, model: PreTrainedModel, name: str, keep: Path | None
) -> dict[str, Any]:
    options, chosen = recipe.evaluation, setup.sets[name]
    num_answers = len(chosen.prompts) * options.num_seeds
    bar = tqdm(total=num_answers, desc=f"answering {name}", unit="prompt", leave=False, disable=not ranks.is_first())
    with bar:
        return ranks.on_first(
            lambda: evaluate_set(
                model,
                setup.tokenizer,
                chosen,
                Sampling(options.max_new_tokens, options.temperature, options.top_p),
                num_seeds=options.num_seeds,
                batch_size=options.batch_size,
                keep=keep and keep / name,
                progress=bar.update,
            )
        )


def answer(recipe: config.LanguageRecipe, setup: Setup, model: PreTrainedModel) -> list[str]:
    """The model's answers to the first `evaluation.num_generated` validation prompts; each rank does its part."""
    options = recipe.evaluation
    asked = [example.prompt for example in setup.validation[: options.num_generated]]
    prompts = ranks.share(asked)
    with tqdm(total=len(prompts), desc="answering", unit="prompt", leave=False, disable=not ranks.is_first()) as bar:
        completions = generate(
            model,
            setup.tokenizer,
            prompts,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            batch_size=options.batch_size,
            seed=recipe.training.seed,
            progress=bar.update,
        )
    return ranks.unshared([completion.text for completion in completions], len(asked))
