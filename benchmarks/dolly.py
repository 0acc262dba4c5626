"""Losses side by side on Dolly with a small real teacher: one start, one data set, one budget, one grid of rates.

    python benchmarks/dolly.py TRAIN.jsonl.gz runs/dolly [--rates 5e-4 2e-4] [--seeds 0 1 2] [--losses sft forward_kl]
        [--without EVALUATION.jsonl ...]

The teacher is SmolLM2-135M-Instruct, the student 24 of its 30 layers, as in the demo. Each loss is trained at each rate
under the first seed; the rate of the best token agreement on the held-out rows is then trained under the other
seeds. Trains what is not there yet and prints one line a run: name, rate, seed, forward KL, reverse KL, alpha-beta
(.2, .7), token agreement and next-token loss on the held-out rows, and seconds. Stop it and start it again as you like.
`--without` leaves out the rows whose instruction and input are also in these files.
"""

import argparse
import copy
import gc
import gzip
import json
import shutil
import sys
from pathlib import Path

from abkd.config import Recipe
from abkd.inputs import check_inputs
from abkd.measures import measure_before
from abkd.recipe import read_recipe
from abkd.run import distil
from abkd.rundir import RunDir
from abkd.setup import make_student, prepare

OBJECTIVES = {
    "sft": ["objective.divergence=null", "objective.kd_weight=0", "objective.ce_weight=1"],
    "forward_kl": ["objective.divergence.kind=forward_kl"],
    "reverse_kl": ["objective.divergence.kind=reverse_kl"],
    "alpha_beta_.2_.7": ["objective.divergence={kind: alpha_beta, alpha: 0.2, beta: 0.7}"],
    "alpha_beta_.4_.7": ["objective.divergence={kind: alpha_beta, alpha: 0.4, beta: 0.7}"],
    "alpha_beta_.2_.4": ["objective.divergence={kind: alpha_beta, alpha: 0.2, beta: 0.4}"],
}
SHOWN = ("forward_kl", "reverse_kl", "alpha_beta", "token_agreement", "next_token_loss")
BUDGET = (
    "data.max_train_rows=240", "data.validation=", "data.num_held_out=200", "data.max_validation_rows=32",
    "data.long_prompts=drop", "data.max_prompt_tokens=96", "data.max_tokens=160", "training.batch_size=4",
    "training.validate_every=0", "training.pack=true", "evaluation.num_generated=0",
)  # fmt: skip


def main() -> None:
    options = _options()
    folder = Path(options.folder)
    train = write_without(Path(options.train), options.without, folder / "train.jsonl.gz")

    def recipe_of(name: str, *overrides: str) -> Recipe:
        common = [*BUDGET, f"training.num_steps={options.steps}", f"data.train={train}"]
        run_dir = folder / name
        recipe = read_recipe("demo", [*common, *overrides, f"run_dir={run_dir}"])
        return recipe.model_copy(update={"resume": (run_dir / "recipe.yaml").exists()})

    first = recipe_of("none")
    setup = prepare(first, check_inputs(first), print)
    start = make_student(first, setup, print)
    measured = measure_before(first, setup, start)

    def agreement_of(name: str, rate: float, seed: int) -> float:
        chosen = f"training.learning_rate={rate}", f"training.seed={seed}"
        recipe = recipe_of(f"{name}-{rate:g}-{seed}", *OBJECTIVES[name], *chosen)
        run_dir = RunDir(Path(recipe.run_dir))
        results = run_dir.read_results() or distil(recipe, setup, copy.deepcopy(start), print, measured)
        if results is None:
            sys.exit("stopped; the same command goes on")
        shutil.rmtree(run_dir.checkpoints, ignore_errors=True)
        figures = (f"{results['after'][key]:.4f}" for key in SHOWN)
        print(f"{name} {rate:g} {seed}", *figures, results["training_s"], flush=True)
        gc.collect()  # the trainer and its student refer to each other
        return results["after"]["token_agreement"]

    first_seed, *others = options.seeds
    best = {}
    for name in options.losses:
        best[name] = max(options.rates, key=lambda rate: agreement_of(name, rate, first_seed))
    for seed in others:
        for name, rate in best.items():
            agreement_of(name, rate, seed)


def write_without(source: Path, left_out: list[str], target: Path) -> Path:
    """The rows of `source` whose instruction and input are in none of the files `left_out`."""
    if not left_out:
        return source
    seen = {_question(row) for file in left_out for row in _rows(Path(file))}
    kept = [row for row in _rows(source) if _question(row) not in seen]
    target.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(target, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    print(f"{len(kept):,} rows are in none of the {len(left_out)} evaluation files")
    return target


def _rows(file: Path) -> list[dict[str, str]]:
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _question(row: dict[str, str]) -> tuple[str, str]:
    return row["instruction"].strip(), row.get("input", "").strip()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("folder")
    parser.add_argument("--without", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--losses", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--steps", type=int, default=60)
    return parser.parse_args()


if __name__ == "__main__":
    main()
