"""Whole training loops of an image classifier: abkd's, a plain PyTorch one, torchdistill's; images a second.

    python benchmarks/image_training.py                            # both pairs; appends to image_training.csv
    python benchmarks/image_training.py --pairs resnet20:resnet8 --steps 40 --repeats 5

All three train the same student from the same weights, with the same teacher, on the same random images of CIFAR's size
and in the same order, under alpha-beta(.8, .3) at temperature 4 with cross-entropy and SGD, one thread, and end at the
same weights, which is checked. Batches of all three come out of `ImageStore.batch`. They take turns step by step in one
process, so that what else the machine does disturbs all of them alike; the first steps are left out. `core_over_plain`
compares the time that the process had of a core, over all steps, logging and new epochs included. `data_share` is the
part of `ImageStore.batch` in the loop's time.

On a CPU, memory that the C library gives back after a step and takes again in the next costs more than all else in
which the loops differ. The fair comparison keeps it:

    MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_MMAP_THRESHOLD_=8589934592 python benchmarks/image_training.py

torchdistill is optional: pip install torchdistill, which needs torchvision.
"""

import argparse
import copy
import csv
import importlib
import importlib.util
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from linear_divergence import git_commit, hardware
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from abkd.calibrations import Plain
from abkd.callbacks import quiet
from abkd.data.images import Augmentation, EpochSampler, ImageStore
from abkd.data.labelled_images import LabelledImages
from abkd.divergences import AlphaBeta
from abkd.models.classifiers import load_classifier
from abkd.objective import Objective
from abkd.teachers.classifier import ClassifierTeacher
from abkd.trainer import ImageDistillationTrainer

CSV = Path(__file__).with_name("image_training.csv")
CLASSES = tuple(map(str, range(100)))
OBJECTIVE = Objective(Plain(AlphaBeta(0.8, 0.3), temperature=4.0), ce_weight=1.0)
AUGMENTATION = Augmentation()
KEPT = "MALLOC_TRIM_THRESHOLD_"
WARM_UP = 3
"""Steps that are not timed."""


class TimedStore(ImageStore):
    """Knows how long it took to make its batches."""

    seconds = 0.0

    def batch(self, keys, augmentation=None):
        started = time.perf_counter()
        made = super().batch(keys, augmentation)
        self.seconds += time.perf_counter() - started
        return made

    def now(self):
        """Seconds of the clock, of the core, and in `batch`."""
        return np.array([time.perf_counter(), time.process_time(), self.seconds])


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


def abkd(student, teacher, store, options, step_done):
    class Turn(TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            step_done()

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=options.steps, per_device_train_batch_size=options.batch_size, learning_rate=0.05,
            max_grad_norm=0.0, logging_steps=10, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = ImageDistillationTrainer(
            model=student, args=args, teacher=ClassifierTeacher(teacher), objective=OBJECTIVE, train_images=store,
            validation_images=store, augmentation=AUGMENTATION, make_optimizer=sgd, rate_factor=lambda epoch: 1.0,
            callbacks=[Turn()],
        )  # fmt: skip
        quiet(trainer)
        trainer.train()


def plain(student, teacher, store, options):
    """Yields after each step."""
    optimizer, sampler = sgd(student.parameters()), EpochSampler(len(store), 42)  # 42: of `TrainingArguments`
    student.train()
    while True:
        for keys in DataLoader(store, options.batch_size, sampler=sampler, collate_fn=torch.tensor):
            images, labels = store.batch(keys, AUGMENTATION), store.labels_of(keys)
            with torch.no_grad():
                teacher_logits = teacher(images)
            loss = loss_of(student(images), teacher_logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield
        sampler.set_epoch(sampler.epoch + 1)


def loss_of(student_logits, teacher_logits, labels):
    return OBJECTIVE(
        student_logits=student_logits, teacher_logits=teacher_logits, labels=labels, num_tokens=len(labels)
    ).total


def torchdistill(student, teacher, store, options):
    """Yields after each step of its training box; the loop is that of its own examples, without the printing."""
    from torchdistill.core.distillation import DistillationBox
    from torchdistill.datasets.registry import register_collate_func

    class Term(torch.nn.Module):
        def forward(self, student_io, teacher_io, targets):
            return loss_of(student_io["."]["output"], teacher_io["."]["output"], targets)

    @register_collate_func
    def batch_of(keys):
        keys = torch.tensor(keys)
        return store.batch(keys, AUGMENTATION), store.labels_of(keys), {}

    sampler = EpochSampler(len(store), 42)
    loader = {"batch_size": options.batch_size, "num_workers": 0}
    kwargs = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
    config = {
        "train_data_loader": {
            "dataset_id": "images", "requires_supp": False, "collate_fn": "batch_of",
            "sampler": {"class_or_func": lambda dataset: sampler}, "kwargs": loader,
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"all": {"criterion": Term(), "weight": 1.0}}}},
        "optimizer": {"key": "SGD", "kwargs": kwargs},
        "num_epochs": options.steps,
    }  # fmt: skip
    box = DistillationBox(teacher, student, {"images": store}, config, torch.device("cpu"), None, False, 1.0)
    while True:
        box.pre_epoch_process(epoch=sampler.epoch)
        for images, labels, supplement in box.train_data_loader:
            box.pre_forward_process()
            loss = box.forward_process(images, labels, supplement)
            box.post_forward_process(loss)
            loss.item()
            yield
        box.post_epoch_process()
        sampler.set_epoch(sampler.epoch + 1)


BESIDE = {"plain": plain, "torchdistill": torchdistill}
"""The loops that take a step after each of abkd's."""


def why_not(method):
    """Why a method cannot be run here, in one line; None where it can."""
    if method != "torchdistill":
        return None
    if importlib.util.find_spec(method) is None:
        return "it is not installed"
    try:
        importlib.import_module("torchdistill.core.distillation")
    except (ImportError, RuntimeError, OSError) as error:
        return f"it cannot be imported: {str(error).splitlines()[0]}"
    return None


def make_classifier(name, seed):
    half = (0.5, 0.5, 0.5)
    return load_classifier(kind="cifar", name=name, num_classes=len(CLASSES), mean=half, std=half, seed=seed)


def measure(pair, beside, options):
    """Method -> `[steps, 3]`, what `TimedStore.now` grew by in each step after the warm-up."""
    teacher_name, student_name = pair.split(":")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (options.num_images, 32, 32, 3), dtype=np.uint8)
    store = TimedStore(LabelledImages(pixels, np.arange(options.num_images) % len(CLASSES), CLASSES))
    teacher, student = make_classifier(teacher_name, 1).requires_grad_(False), make_classifier(student_name, 0)
    students = {method: copy.deepcopy(student) for method in ("abkd", *beside)}
    loops = {method: BESIDE[method](students[method], teacher, store, options) for method in beside}
    laps = {method: [] for method in students}
    started = store.now()

    def step_done():
        nonlocal started
        laps["abkd"].append(store.now() - started)
        for method, loop in loops.items():
            started = store.now()
            next(loop)
            laps[method].append(store.now() - started)
        started = store.now()

    abkd(students["abkd"], teacher, store, options, step_done)
    ends = {method: torch.nn.utils.parameters_to_vector(each.parameters()) for method, each in students.items()}
    for method, end in ends.items():
        if not torch.equal(end, ends["plain"]):
            sys.exit(f"{pair}: {method} ends {(end - ends['plain']).abs().max():.2g} away from the plain loop")
    return {method: np.stack(each[WARM_UP:]) for method, each in laps.items()}


def rows(pair, runs, batch_size):
    """Of each method, over all repeats; `lowest` and `highest` are of single repeats."""
    for method in runs[0]:
        speeds = [np.median(run["plain"][:, 0]) / np.median(run[method][:, 0]) for run in runs]
        clock, core, data = np.concatenate([run[method] for run in runs]).T
        _, core_of_plain, _ = np.concatenate([run["plain"] for run in runs]).T
        yield {
            "pair": pair,
            "method": method,
            "images_per_s": round(batch_size / np.median(clock), 1),
            "speed_over_plain": round(np.median(speeds), 3),
            "lowest": round(min(speeds), 3),
            "highest": round(max(speeds), 3),
            "core_ms_per_step": round(1000 * np.median(core), 2),
            "core_over_plain": round(core.mean() / core_of_plain.mean(), 3),
            "data_share": round(data.sum() / clock.sum(), 4),
        }


def write(row):
    is_new = not CSV.exists()
    with CSV.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def main():
    options = _options()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    beside = []
    for method in BESIDE:
        if reason := why_not(method):
            print(f"{method} is left out: {reason}")
        else:
            beside.append(method)
    common = {"date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "hardware": hardware("cpu"), "threads": 1,
              "torch": torch.__version__, "batch_size": options.batch_size, "steps": options.steps,
              "repeats": options.repeats, "memory": "kept" if KEPT in os.environ else "default"}  # fmt: skip
    for pair in options.pairs.split(","):
        runs = [measure(pair, beside, options) for _ in range(options.repeats)]
        for row in rows(pair, runs, options.batch_size):
            print(*(f"{name}={value}" for name, value in row.items()), flush=True)
            write(common | row)


def _options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="resnet56:resnet20,resnet20:resnet8", help="teacher:student, ...")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-images", type=int, default=1920, help="of an epoch")
    parser.add_argument("--steps", type=int, default=20, help=f"of each method and repeat, {WARM_UP} of them not timed")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
