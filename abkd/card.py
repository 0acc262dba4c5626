"""The model card of a run's student: README.md as a model hub reads it."""

from typing import Any

from huggingface_hub import ModelCardData

from abkd.config import Recipe
from abkd.models.pretrained import find_model
from abkd.paths import find_path
from abkd.rundir import environment

CARD = "README.md"
MEASURES = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "alpha_beta": "α-β (0.2, 0.7)",
    "token_agreement": "agreement",
    "next_token_loss": "next-token loss",
    "rouge_l": "ROUGE-L",
}


def model_card(recipe: Recipe, results: dict[str, Any]) -> str:
    """What the student is made of, how, what came out, and the command that repeats it.

    Args:
        recipe: of the run. Its paths are in the card as the recipe writes them, and no others.
        results: the content of results.json.
    """
    made_by = environment()
    again = f"abkd train recipe.yaml run_dir={recipe.run_dir}-again"
    if (count := made_by["num_processes"]) > 1:
        again = f"torchrun --nproc-per-node {count} -m {again}"
    commit = f", commit {made_by['commit']}" if made_by["commit"] else ""
    content = recipe.model_copy(update={"resume": False}).to_yaml()
    made = _made(recipe, results)
    return f"""---
{_front_matter(recipe).to_yaml()}
---

# {recipe.run_dir.rstrip("/").rpartition("/")[2]}

{made[0].upper()}{made[1:]}

Trained by abkd {made_by["versions"].get("abkd", "")}{commit}, torch {made_by["versions"]["torch"]}.

## Results

On {results["after"]["num_tokens"]:,} tokens of validation data. Divergences from the teacher and next-token loss are in
nats per token, lower is better; agreement is the share of tokens where student and teacher prefer the same one.

{_table(results)}

## Repeat it

Save this as `recipe.yaml`, then `{again}`:

```yaml
{content}```
"""


def _front_matter(recipe: Recipe) -> ModelCardData:
    """What a hub indexes. Of models and data only those that are on a hub."""
    start = recipe.student if recipe.student.kind == "pretrained" else recipe.teacher
    assert start is not None
    is_adapter = recipe.student.lora is not None and not recipe.student.lora.merge
    return ModelCardData(
        base_model=start.path if find_model(start.path, "student.path") is None else None,
        datasets=None if find_path(recipe.data.train, "data.train").exists() else [recipe.data.train],
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["abkd", "fine-tuning" if recipe.teacher is None else "distillation"],
    )


def _made(recipe: Recipe, results: dict[str, Any]) -> str:
    steps = f"{results['num_steps']:,} steps"
    if recipe.training.keep_best:
        steps += f", of which it is step {results['student_step']:,}, the best by {recipe.training.keep_best}"
    lora = f", with LoRA of rank {recipe.student.lora.rank}" if recipe.student.lora else ""
    data = f"on `{recipe.data.train}` for {steps}{lora}"
    start = "" if recipe.student.kind == "shrink" else f"`{recipe.student.path}`, "
    if recipe.teacher is None:
        return f"{start}fine-tuned {data}."
    if recipe.student.kind == "shrink":
        kept = recipe.student.keep_layers or len(recipe.student.layers)
        start = f"{kept} layers of its teacher, "
    objective = results["calibration"] if recipe.objective.calibration else results["divergence"]
    return f"{start}distilled from `{recipe.teacher.path}` under {objective} {data}."


def _table(results: dict[str, Any]) -> str:
    rows = {name: results[name] for name in ("teacher", "before", "after") if name in results}
    measures = [name for name in MEASURES if name in results["after"]]
    lines = ["| | " + " | ".join(MEASURES[name] for name in measures) + " | parameters |"]
    lines.append("|---" * (len(measures) + 2) + "|")
    for title, row in rows.items():
        numbers = " | ".join(f"{row[name]:.3f}" for name in measures)
        lines.append(f"| {title} | {numbers} | {row['num_parameters']:,} |")
    return "\n".join(lines)
