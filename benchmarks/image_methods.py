"""Calibrations and their alpha-beta forms side by side: few labels and all labels, one budget, several seeds.

    python benchmarks/image_methods.py IMAGES runs/cifar10 --labels 40 --epochs 10 \\
        --teacher "{kind: cifar, name: resnet56_a, path: X.th, mean: [.485, .456, .406], std: [.229, .224, .225]}" \\
        --student "{kind: cifar, name: resnet8, size: 16}"

IMAGES is anything that data.train takes, with a train and a test split. The methods and their (alpha, beta) are those
of the shipped recipe for resnet56 -> resnet20. Trains what is not there yet and prints one line a run: labels per
class (0 for all), method, seed, top-1, agreement, forward KL, entropy, calibration error, seconds. Stop it and start it
again as you like.
"""

import argparse
import gc
import itertools
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from abkd.config import Recipe
from abkd.inputs import check_inputs
from abkd.recipe import read_recipe
from abkd.run import distil
from abkd.rundir import RunDir
from abkd.tasks import images as task

METHODS = ("alone", "kd", "abkd", "rkl", "dkd", "abdkd", "lsd", "ablsd", "ttm", "abttm")
NEED_LABELS = ("dkd", "abdkd")
SHOWN = ("top1", "agreement", "forward_kl", "entropy", "calibration_error")
ALONE = ["objective.divergence=null", "objective.temperature=1", "objective.kd_weight=0", "objective.ce_weight=1"]


def main() -> None:
    options = _options()
    folder = Path(options.folder)

    def recipe_of(method: str, labels: int, seed: int) -> Recipe:
        run_dir = folder / f"{method}-{labels}-{seed}"
        overrides = [
            f"data.train={options.images}", f"data.num_labelled_per_class={labels}",
            f"teacher={options.teacher}", "teacher.remember=true", f"student={options.student}",
            f"training.num_epochs={options.epochs}", "training.schedule=cosine",
            "training.validate_every_epochs=0", "training.save_every_epochs=0",
            f"training.seed={seed}", f"run_dir={run_dir}", *(ALONE if method == "alone" else []), *options.overrides,
        ]  # fmt: skip
        name = "resnet56_resnet20" + ("" if method == "alone" else f"+methods/{method}")
        return read_recipe(name, overrides).model_copy(update={"resume": (run_dir / "recipe.yaml").exists()})

    setups: dict[int, Any] = {}  # labels per class -> what runs share; the teacher remembers for both

    def setup_of(labels: int) -> Any:
        if not setups:
            for each in (0, options.labels):
                fresh = recipe_of("kd", each, 0).model_copy(update={"run_dir": f"{folder}/none", "resume": False})
                made = task.prepare(fresh, check_inputs(fresh), print)
                first = setups.get(0, made)
                setups[each] = replace(made, teacher=first.teacher, test=first.test)
        return setups[labels]

    for seed, labels, method in itertools.product(options.seeds, (options.labels, 0), options.methods):
        if labels and method in NEED_LABELS:
            continue
        recipe = recipe_of(method, labels, seed)
        run_dir = RunDir(Path(recipe.run_dir))
        results = run_dir.read_results()
        if results is None:
            setup = setup_of(labels)
            results = distil(recipe, setup, task.make_student(recipe, setup, print), print)
        if results is None:
            sys.exit("stopped; the same command goes on")
        shutil.rmtree(run_dir.checkpoints, ignore_errors=True)
        figures = (f"{results['after'][key]:.4f}" for key in SHOWN)
        print(f"{labels} {method} {seed}", *figures, results["training_s"], flush=True)
        gc.collect()  # the trainer and its student refer to each other


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("folder")
    parser.add_argument("--teacher", required=True, metavar="SECTION", help="of a recipe, in YAML")
    parser.add_argument("--student", required=True, metavar="SECTION")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--labels", type=int, default=40, help="per class, where there are few")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
