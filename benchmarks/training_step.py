"""Whole training steps: abkd's trainer and TRL's on one set of models and examples, each in a process of its own.

    python benchmarks/training_step.py                                  # every method; appends to training_step.csv
    python benchmarks/training_step.py --methods "abkd;TRL GKD" --layers 6 --batch-size 8 --repeats 3

The teacher is SmolLM2-135M-Instruct (vocabulary 49,152), the student some of its layers, all weights trained with
AdamW in fp32; data, order and schedule are those of `abkd/recipes/demo.yaml`. Time: median seconds of a step, the first
two left out. Memory: peak of the resident memory while training, above what is resident before it; and the same less
the gradients and AdamW's two moments, which every method holds. Validation: forward KL to the teacher after the last
step, measured by `abkd.evaluation.fidelity` for all. The on-policy methods sample 32 tokens to each prompt.

TRL is optional: pip install -c constraints.txt -e '.[bench]'.
"""

import argparse
import csv
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

from linear_divergence import git_commit, hardware, resident_mib

CSV = Path(__file__).with_name("training_step.csv")
FORWARD_KL = ["objective.divergence={kind: forward_kl}"]
REVERSE_KL = ["objective.divergence={kind: reverse_kl}"]
SAMPLED = ["rollouts.kind=on_policy", "rollouts.max_new_tokens=32"]
METHODS = {
    "abkd": FORWARD_KL,
    "abkd, packed": [*FORWARD_KL, "training.pack=true"],
    "abkd, dense": [*FORWARD_KL, "training.logits=dense"],
    "abkd, alpha-beta (.2, .7)": [],
    "TRL GKD": FORWARD_KL,
    "abkd, on-policy": [*REVERSE_KL, *SAMPLED],
    "TRL DistillationTrainer, on-policy": [*REVERSE_KL, *SAMPLED],
}


def main():
    options = _options()
    if options.one:
        print(json.dumps(_measure(options)))
        return
    import torch

    common = {
        "date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "hardware": hardware("cpu"),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    for repeat, method in itertools.product(range(options.repeats), options.methods.split(";")):
        if method.startswith("TRL") and importlib.util.find_spec("trl") is None:
            print(f"{method}: trl is not installed")
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--one", method]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{method}: {done.stderr[-3000:]}")
        figures = json.loads(done.stdout.splitlines()[-1])
        shape = {name: getattr(options, name) for name in ("layers", "batch_size", "steps")}
        row = {**common, "method": method, "repeat": repeat, **shape, **figures}
        is_new = not CSV.exists()
        with CSV.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, row)
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        print(method, *(f"{name}={value}" for name, value in figures.items()), flush=True)


def _measure(options):
    """What one method does in this process."""
    warnings.filterwarnings("ignore")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from abkd.data.batches import Collator, batches_by_length
    from abkd.divergences import ForwardKL
    from abkd.evaluation.fidelity import fidelity
    from abkd.inputs import check_inputs
    from abkd.recipe import read_recipe
    from abkd.setup import make_student, prepare

    recipe = read_recipe("demo", [
        *METHODS[options.one], f"student.keep_layers={options.layers}", "student.freeze_embeddings=false",
        "teacher.remember=false", f"training.num_steps={options.steps}", f"training.batch_size={options.batch_size}",
        "training.group_by_length=false", "training.validate_every=0", "training.learning_rate=1e-4",
    ])  # fmt: skip
    setup = prepare(recipe, check_inputs(recipe), lambda line: None)
    student = make_student(recipe, setup, lambda line: None)
    trained = sum(weight.numel() for weight in student.parameters() if weight.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        make = _abkd if options.one.startswith("abkd") else _gkd if options.one == "TRL GKD" else _distillation
        trainer = make(recipe, setup, student, Path(folder))
        watch = _Watch()
        trainer.add_callback(watch.callback())
        trainer.train()
        watch.stop()
    batches = batches_by_length(setup.validation, Collator.of(setup.tokenizer), 4)
    left = fidelity(student, setup.teacher.targets, batches, {"forward_kl": ForwardKL()})
    lengths = [line[key] for line in trainer.state.log_history for key in _LENGTHS if key in line]
    return {
        "seconds": round(statistics.median(watch.seconds[2:]), 3),
        "seconds_spread": round(max(watch.seconds[2:]) - min(watch.seconds[2:]), 3),
        "extra_mib": round(watch.peak - watch.before),
        "extra_without_optimizer_mib": round(watch.peak - watch.before - 3 * 4 * trained / 2**20),
        "forward_kl": round(left["forward_kl"], 4),
        "sampled_tokens": round(statistics.mean(lengths), 1) if lengths else "",
    }


_LENGTHS = ("sampled_tokens", "completions/mean_length")
"""What abkd and TRL call the mean length of what was sampled."""


class _Watch:
    """Seconds of each step, and the peak of the resident memory, from the first step's beginning on."""

    def __init__(self):
        self.before, self.peak, self.seconds = resident_mib(), 0.0, []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self):
        while not self._done.wait(0.002):
            self.peak = max(self.peak, resident_mib())

    def stop(self):
        self._done.set()
        self._thread.join()

    def callback(self):
        from transformers import TrainerCallback

        seconds = self.seconds

        class Clock(TrainerCallback):
            def on_train_begin(self, args, state, control, **rest):
                self.last = time.perf_counter()

            def on_step_end(self, args, state, control, **rest):
                now = time.perf_counter()
                seconds.append(now - self.last)
                self.last = now

        return Clock()


def _abkd(recipe, setup, student, folder):
    from abkd.rundir import RunDir
    from abkd.tasks.language import make_trainer

    (folder / "run").mkdir()
    return make_trainer(recipe, setup, student, RunDir(folder / "run"))


def _arguments(recipe, folder):
    """What TRL's configurations share with the recipe."""
    training = recipe.training
    return {
        "output_dir": str(folder), "max_steps": training.num_steps, "per_device_train_batch_size": training.batch_size,
        "learning_rate": training.learning_rate, "lr_scheduler_type": training.schedule,
        "warmup_steps": training.warmup_steps, "weight_decay": training.weight_decay, "seed": training.seed,
        "max_grad_norm": training.max_grad_norm, "bf16": False, "gradient_checkpointing": False, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip


def _gkd(recipe, setup, student, folder):
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from abkd.data.batches import Collator

    pad = Collator.of(setup.tokenizer)

    def collate(rows):
        batch = pad([setup.train[row["place"]] for row in rows])
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    return GKDTrainer(
        model=student,
        teacher_model=setup.teacher.model,
        args=GKDConfig(lmbda=0.0, beta=0.0, **_arguments(recipe, folder)),
        data_collator=collate,
        train_dataset=Dataset.from_dict({"place": list(range(len(setup.train)))}),
        processing_class=setup.tokenizer,
    )


def _distillation(recipe, setup, student, folder):
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    rollouts = recipe.rollouts
    return DistillationTrainer(
        model=student,
        teacher_model=setup.teacher.model,
        args=DistillationConfig(
            beta=1.0,
            max_completion_length=rollouts.max_new_tokens,
            temperature=rollouts.temperature,
            top_p=rollouts.top_p,
            top_k=0,
            **_arguments(recipe, folder),
        ),
        train_dataset=Dataset.from_dict({"prompt": [example.prompt for example in setup.train]}),
        processing_class=setup.tokenizer,
    )


def _options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=";".join(METHODS))
    parser.add_argument("--layers", type=int, default=12, help="of the teacher's 30, kept by the student")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
