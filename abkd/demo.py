"""The demo: one teacher, one shrunken student, three divergences, the same batches; a table, answers, a figure."""

import copy
import gc
import time
from pathlib import Path
from typing import Any

from abkd.analysis.mass import RankMass
from abkd.analysis.plots import draw_comparison
from abkd.analysis.report import REPORT, report_after
from abkd.analysis.table import print_table
from abkd.config import LanguageRecipe
from abkd.inputs import Inputs
from abkd.measures import measure_before
from abkd.recipe import parse_recipe
from abkd.run import distil
from abkd.rundir import RunDir
from abkd.setup import Say, make_student, prepare

DIVERGENCES: dict[str, dict[str, Any]] = {
    "forward KL": {"kind": "forward_kl"},
    "reverse KL": {"kind": "reverse_kl"},
    "alpha-beta": {"kind": "alpha_beta", "alpha": 0.2, "beta": 0.7},
}
MEASURES = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "alpha_beta": "α-β (0.2, 0.7)"}


def run_demo(recipe: LanguageRecipe, inputs: Inputs, say: Say) -> bool:
    """Runs it all in folders under `recipe.run_dir`. False if it was interrupted."""
    started = time.monotonic()
    setup = prepare(recipe, inputs, say)
    start = make_student(recipe, setup, say)
    say("measuring the teacher and the student before training")
    measured = measure_before(recipe, setup, start)
    results = {}
    for name, divergence in DIVERGENCES.items():
        run = _under(recipe, divergence)
        say(f"distilling under {name} into {run.run_dir}")
        result = distil(run, setup, copy.deepcopy(start), say, measured)
        if result is None:
            say(f"stopped; go on with this student by: {RunDir(Path(run.run_dir)).how_to_go_on}")
            return False
        results[name] = result
        gc.collect()  # the trainer and its student refer to each other
    _report(recipe, setup.validation, measured, results, say)
    say(f"the demo took {(time.monotonic() - started) / 60:.1f} minutes")
    return True


def _under(recipe: LanguageRecipe, divergence: dict[str, Any]) -> LanguageRecipe:
    content = recipe.to_dict()
    content["objective"]["divergence"] = divergence
    content["run_dir"] = str(Path(recipe.run_dir) / divergence["kind"])
    changed = parse_recipe(content)
    assert isinstance(changed, LanguageRecipe)
    return changed


def _report(recipe: LanguageRecipe, validation, measured: dict[str, Any], results: dict[str, Any], say: Say) -> None:
    rows = {"teacher": measured["teacher"], "before": measured["before"]}
    rows |= {f"after {name}": result["after"] for name, result in results.items()}
    for index, example in enumerate(validation[: recipe.evaluation.num_generated]):
        say(f"\nprompt: {example.question!r}")
        for name, row in rows.items():
            say(f"  {name}: {row['answers'][index].strip()!r}")
    say("")
    print_table(rows)
    folder = Path(recipe.run_dir)
    runs = [folder / divergence["kind"] for divergence in DIVERGENCES.values()]
    report_after(runs, folder / REPORT, say)
    figure = folder / "comparison.png"
    masses = {"before": RankMass(**measured["before"]["rank_mass"])}
    masses |= {name: RankMass(**result["after"]["rank_mass"]) for name, result in results.items()}
    draw_comparison({title: _curves(folder, key, measured, results) for key, title in MEASURES.items()}, masses, figure)
    student = folder / "alpha_beta" / "student"
    say(f"figure: {figure}")
    say(f"students: {folder}/*/student, in Hugging Face format. Load one in plain transformers:")
    question = "[{'role': 'user', 'content': 'Name three fruits.'}]"
    pipeline = f"pipeline('text-generation', '{student}')({question}, max_new_tokens=40)"
    say(f"  python -c \"from transformers import pipeline; print({pipeline}[0]['generated_text'][-1]['content'])\"")


def _curves(
    folder: Path, key: str, measured: dict[str, Any], results: dict[str, Any]
) -> dict[str, list[tuple[int, float]]]:
    """Student -> (step, validation value): before, during and after training."""
    curves = {}
    for name, result in results.items():
        points = {0: measured["before"][key]}
        for record in RunDir(folder / DIVERGENCES[name]["kind"]).read_metrics():
            if f"validation_{key}" in record:
                points[record["step"]] = record[f"validation_{key}"]
        points[result["num_steps"]] = result["after"][key]
        curves[name] = sorted(points.items())
    return curves
