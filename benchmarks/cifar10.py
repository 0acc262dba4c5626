"""Calibrations side by side on CIFAR-10 with a real teacher: few labels and all labels, one budget, several seeds.

    python benchmarks/cifar10.py IMAGES resnet56-4bfd9763.th runs/cifar10 [--seeds 0 1 2] [--epochs 10]

IMAGES is anything that data.train takes with a train and a test split; the teacher is the option-A ResNet-56 of
akamaster/pytorch_resnet_cifar10, the student a ResNet-8 that sees the images at 16 x 16. The methods and their (alpha,
beta) are those of the shipped recipe for resnet56 -> resnet20. Trains what is not there yet and prints one line a run:
labels per class (0 for all), method, seed, top-1, agreement, forward KL, entropy, calibration error, seconds. Stop it
and start it again as you like.
"""

import argparse
import gc
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
TEACHER = "{{kind: cifar, name: resnet56_a, path: {}, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}}"


def main() -> None:
    options = _options()
    folder = Path(options.folder)

    def recipe_of(method: str, labels: int, seed: int) -> Recipe:
        run_dir = folder / f"{method}-{labels}-{seed}"
        overrides = [
            f"data.train={options.images}", f"data.num_labelled_per_class={labels}",
            f"teacher={TEACHER.format(options.teacher)}", "teacher.remember=true",
            "student={kind: cifar, name: resnet8, size: 16}", f"training.num_epochs={options.epochs}",
            "training.schedule=cosine", "training.validate_every_epochs=0", "training.save_every_epochs=0",
            f"training.seed={seed}", f"run_dir={run_dir}", *(ALONE if method == "alone" else []),
        ]  # fmt: skip
        name = "resnet56_resnet20" + ("" if method == "alone" else f"+methods/{method}")
        return read_recipe(name, overrides).model_copy(update={"resume": (run_dir / "recipe.yaml").exists()})

    all_setup = few_setup = None
    measured: dict[str, Any] = {}
    for seed in options.seeds:
        for labels in (options.labels, 0):
            for method in options.methods:
                if labels and method in NEED_LABELS:
                    continue
                recipe = recipe_of(method, labels, seed)
                results = RunDir(Path(recipe.run_dir)).read_results()
                if results is None:
                    if all_setup is None:
                        setups = [task.prepare(r, check_inputs(r), print) for r in _two(recipe_of, options)]
                        all_setup = setups[0]
                        few_setup = replace(setups[1], teacher=all_setup.teacher, test=all_setup.test)
                        measured["teacher"] = task.measure(recipe, all_setup, task.teacher_model(all_setup))
                    setup = few_setup if labels else all_setup
                    student = task.make_student(recipe, setup, print)
                    measured["before"] = task.measure(recipe, all_setup, student)
                    results = distil(recipe, setup, student, print, dict(measured))
                if results is None:
                    sys.exit("stopped; the same command goes on")
                shutil.rmtree(RunDir(Path(recipe.run_dir)).checkpoints, ignore_errors=True)
                figures = (f"{results['after'][key]:.4f}" for key in SHOWN)
                print(f"{labels} {method} {seed}", *figures, results["training_s"], flush=True)
                gc.collect()  # the trainer and its student refer to each other


def _two(recipe_of: Any, options: argparse.Namespace) -> list[Recipe]:
    """Recipes with all labels and with few, in folders that are not made."""
    return [
        recipe_of("kd", labels, 0).model_copy(update={"run_dir": f"{options.folder}/none", "resume": False})
        for labels in (0, options.labels)
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("teacher")
    parser.add_argument("folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--labels", type=int, default=40, help="per class, where there are few")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
