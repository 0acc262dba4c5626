"""The model card of a run's student: README.md as a model hub reads it."""

from typing import Any

from huggingface_hub import ModelCardData

from abkd.analysis.report.words import model_words
from abkd.config import ImageRecipe, LanguageRecipe, Recipe
from abkd.errors import InputError
from abkd.models.pretrained import find_model
from abkd.paths import find_path
from abkd.rundir import environment
from abkd.teachers.cache.manifest import Manifest

CARD = "README.md"
MEASURES = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "alpha_beta": "α-β (0.2, 0.7)",
    "token_agreement": "agreement",
    "next_token_loss": "next-token loss",
    "rouge_l": "ROUGE-L",
}
IMAGE_MEASURES = {
    "top1": "top-1",
    "top5": "top-5",
    "base_accuracy": "base",
    "new_accuracy": "new",
    "harmonic_mean": "harmonic mean",
    "agreement": "agreement",
    "cross_entropy": "cross-entropy",
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "alpha_beta": "α-β (0.2, 0.7)",
    "calibration_error": "calibration error",
}


def language_card(recipe: LanguageRecipe, results: dict[str, Any]) -> str:
    """The card of a language model; see `_card`."""
    intro = (
        f"On {results['after']['num_tokens']:,} tokens of validation data. Divergences from the teacher and next-token "
        "loss are in\nnats per token, lower is better; agreement is the share of tokens where student and teacher "
        "prefer the same one."
    )
    return _card(recipe, _front_matter(recipe), _made(recipe, results), intro, _table(results, MEASURES))


def image_card(recipe: ImageRecipe, results: dict[str, Any]) -> str:
    """The card of an image classifier; see `_card`."""
    after = results["after"]
    selected = {"last": "the last step", "validation": "the best validation accuracy", "test": "the best TEST accuracy"}
    intro = (
        f"On {after['num_images']:,} test images; the student is that of {selected[recipe.training.select_on]}. "
        "Accuracies and agreement\nare shares, divergences from the teacher and cross-entropy nats per image."
    )
    if recipe.data.clip_set:
        intro += " Base and new: the images of\nbase classes among base classes, those of new classes among new ones."
    data = f"on the images of `{recipe.data.clip_set or recipe.data.train}` for {results['num_steps']:,} steps."
    start = getattr(recipe.student, "name", "") or recipe.student.path
    objective = results["calibration"] if recipe.objective.calibration else results["divergence"]
    teacher = recipe.teacher and _teacher(recipe.teacher)
    made = (
        f"`{start}` trained {data}"
        if teacher is None
        else f"`{start}`, distilled from {teacher} under {objective} {data}"
    )
    front = ModelCardData(
        library_name="abkd",
        pipeline_tag="image-classification",
        tags=["abkd", "image-classification" if teacher is None else "distillation"],
    )
    return _card(recipe, front, made, intro, _table(results, IMAGE_MEASURES))


def _card(recipe: Recipe, front_matter: ModelCardData, made: str, intro: str, table: str) -> str:
    """What the student is made of, how, what came out, and the command that repeats it.

    Args:
        recipe: of the run. Its paths are in the card as the recipe writes them, and no others.
    """
    made_by = environment()
    again = f"abkd train recipe.yaml run_dir={recipe.run_dir}-again"
    if (count := made_by["num_processes"]) > 1:
        again = f"torchrun --nproc-per-node {count} -m {again}"
    commit = f", commit {made_by['commit']}" if made_by["commit"] else ""
    content = recipe.model_copy(update={"resume": False}).to_yaml()
    return f"""---
{front_matter.to_yaml()}
---

# {recipe.run_dir.rstrip("/").rpartition("/")[2]}

{made[0].upper()}{made[1:]}

Trained by abkd {made_by["versions"].get("abkd", "")}{commit}, torch {made_by["versions"]["torch"]}.

## Results

{intro}

{table}

## Repeat it

Save this as `recipe.yaml`, then `{again}`:

```yaml
{content}```
"""


def _front_matter(recipe: LanguageRecipe) -> ModelCardData:
    """What a hub indexes. Of models and data only those that are on a hub."""
    start = recipe.student.path or getattr(recipe.teacher, "path", "")
    is_adapter = recipe.student.lora is not None and not recipe.student.lora.merge
    return ModelCardData(
        base_model=start if find_model(start, "student.path") is None else None,
        datasets=None if find_path(recipe.data.train, "data.train").exists() else [recipe.data.train],
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["abkd", "fine-tuning" if recipe.teacher is None else "distillation"],
    )


def _made(recipe: LanguageRecipe, results: dict[str, Any]) -> str:
    steps = f"{results['num_steps']:,} steps"
    if recipe.training.keep_best:
        steps += f", of which it is step {results['student_step']:,}, the best by {recipe.training.keep_best}"
    lora = f", with LoRA of rank {recipe.student.lora.rank}" if recipe.student.lora else ""
    data = f"on `{recipe.data.train}` for {steps}{lora}"
    start = f"`{recipe.student.path}`, " if recipe.student.path else ""
    if recipe.teacher is None:
        return f"{start}fine-tuned {data}."
    if recipe.student.kind == "shrink":
        kept = recipe.student.keep_layers or len(recipe.student.layers)
        start = f"{kept} layers of {f'`{recipe.student.path}`' if recipe.student.path else 'its teacher'}, "
    objective = results["calibration"] if recipe.objective.calibration else results["divergence"]
    return f"{start}distilled from {_teachers(recipe)} under {objective} {data}."


def _teachers(recipe: LanguageRecipe) -> str:
    names = [_teacher(each) for each in recipe.teachers]
    return names[0] if len(names) == 1 else f"a mixture of {' and '.join(names)}"


def _teacher(section: Any) -> str:
    """Its name; of a cache that of the teacher who wrote it, while it is there."""
    if section.kind != "cached":
        return f"`{getattr(section, 'model', '') or section.path or section.name}`"
    try:
        manifest = Manifest.read(find_path(section.path, "teacher.path"), "teacher.path")
    except InputError:
        return f"the cache `{section.path}`"
    return f"targets that `{model_words(manifest.teacher['section'])}` wrote"


def _table(results: dict[str, Any], named: dict[str, str]) -> str:
    rows = {name: results[name] for name in ("teacher", "before", "after") if name in results}
    measures = [name for name in named if name in results["after"]]
    lines = ["| | " + " | ".join(named[name] for name in measures) + " | parameters |"]
    lines.append("|---" * (len(measures) + 2) + "|")
    for title, row in rows.items():
        numbers = " | ".join(f"{row[name]:.3f}" if name in row else "" for name in measures)
        lines.append(f"| {title} | {numbers} | {row['num_parameters']:,} |")
    return "\n".join(lines)
