"""The demo: one teacher, one shrunken student, three divergences, the same batches; a table, answers, a figure."""

import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abkd.analysis.mass import RankMass
from abkd.analysis.plots import draw_comparison
from abkd.analysis.table import print_table
from abkd.config import Recipe, parse_recipe, read_recipe
from abkd.inputs import check_inputs
from abkd.run import Say, distil, make_student, measure_before, prepare
from abkd.rundir import RunDir

DIVERGENCES = {
    "forward KL": {"kind": "forward_kl"},
    "reverse KL": {"kind": "reverse_kl"},
    "alpha-beta": {"kind": "alpha_beta", "alpha": 0.2, "beta": 0.7},
}
MEASURES = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "alpha_beta": "α-β (0.2, 0.7)"}
QUICK = (
    "data.max_train_rows=12",
    "data.max_validation_rows=4",
    "training.num_steps=3",
    "training.batch_size=4",
    "training.warmup_steps=0",
    "training.validate_every=0",
    "evaluation.num_generated=2",
    "evaluation.max_new_tokens=16",
)


def run_demo(overrides: Sequence[str], *, quick: bool, say: Say) -> bool:
    """Runs it all under a new folder, `run_dir` or the next free name. False if it was interrupted."""
    started = time.monotonic()
    recipe = read_recipe("demo", [*(QUICK if quick else ()), *overrides])
    recipe = recipe.model_copy(update={"run_dir": str(_free_folder(Path(recipe.run_dir)))})
    setup = prepare(recipe, check_inputs(recipe), say)
    start = make_student(recipe, setup)
    say("measuring the teacher and the student before training")
    measured = measure_before(recipe, setup, start)
    results = {}
    for name, divergence in DIVERGENCES.items():
        run = _under(recipe, divergence)
        say(f"distilling under {name} into {run.run_dir}")
        results[name] = distil(run, setup, copy.deepcopy(start), say, measured)
        if results[name] is None:
            say(f"stopped; go on with this student by: abkd train {run.run_dir}/recipe.yaml resume=true")
            return False
    _report(recipe, setup.validation, measured, results, say)
    say(f"the demo took {(time.monotonic() - started) / 60:.1f} minutes")
    return True


def _free_folder(path: Path) -> Path:
    candidates = (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in range(1, 10_000))
    return next(candidate for candidate in candidates if not candidate.exists())


def _under(recipe: Recipe, divergence: dict[str, Any]) -> Recipe:
    content = recipe.model_dump()
    content["objective"]["divergence"] = divergence
    content["run_dir"] = str(Path(recipe.run_dir) / divergence["kind"])
    return parse_recipe(content)


def _report(recipe: Recipe, validation, measured: dict[str, Any], results: dict[str, Any], say: Say) -> None:
    rows = {"teacher": measured["teacher"], "student before": measured["before"]}
    rows |= {f"student after {name}": result["after"] for name, result in results.items()}
    for index, example in enumerate(validation[: recipe.evaluation.num_generated]):
        say(f"\nprompt: {example.question!r}")
        for name, row in rows.items():
            say(f"  {name}: {row['answers'][index].strip()!r}")
    say("")
    print_table(rows)
    folder = Path(recipe.run_dir)
    figure = folder / "comparison.png"
    masses = {"before": RankMass(**measured["before"]["rank_mass"])}
    masses |= {name: RankMass(**result["after"]["rank_mass"]) for name, result in results.items()}
    draw_comparison({title: _curves(folder, key, measured, results) for key, title in MEASURES.items()}, masses, figure)
    student = folder / "alpha_beta" / "student"
    say(f"figure: {figure}")
    say(f"students: {folder}/*/student, in Hugging Face format. Load one in plain transformers:")
    say(
        f"  python -c \"from transformers import pipeline; print(pipeline('text-generation', '{student}')"
        "([{'role': 'user', 'content': 'Name three fruits.'}], max_new_tokens=40)[0]['generated_text'][-1]['content'])\""
    )


def _curves(
    folder: Path, key: str, measured: dict[str, Any], results: dict[str, Any]
) -> dict[str, list[tuple[int, float]]]:
    """Student -> (step, validation value): before, during and after training."""
    curves = {}
    for name, result in results.items():
        points = {0: measured["before"][key]}
        lines = RunDir(folder / DIVERGENCES[name]["kind"]).metrics.read_text(encoding="utf-8").splitlines()
        for record in map(json.loads, lines):
            if f"validation_{key}" in record:
                points[record["step"]] = record[f"validation_{key}"]
        points[result["num_steps"]] = result["after"][key]
        curves[name] = sorted(points.items())
    return curves
