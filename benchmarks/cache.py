"""A teacher from a cache beside the teacher in the room: bytes and errors of each form, and whole training steps.

    python benchmarks/cache.py errors                      # a row a form, student and divergence into cache_errors.csv
    python benchmarks/cache.py steps [--layers 6]          # a row a teacher into cache_steps.csv
    python benchmarks/cache.py students                    # a row a teacher, point and seed into cache_students.csv

Errors: rows and students are those of `benchmarks/top_k.py`; each form is encoded, decoded, and compared with the dense
row, value and gradient on the hidden states as there. Bytes a token are those of the encoded rows; a shard adds 24 to
each example. Samples: four of them, as there.

Steps: the demo's teacher, data, student and trainer; each batch is taken by every teacher in turn, forward, backward,
optimiser. Median seconds of a step, the median and the range over the batches of the ratio of steps per second to the
teacher in the process, and the share of the steps in which the teacher was asked.

Students: the demo's training under each teacher; what became of them, against the teacher in the process, on the
validation data.
"""

import argparse
import csv
import itertools
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import top_k
import torch
from linear_divergence import git_commit, hardware
from training_step import _abkd

from abkd.divergences import JSD
from abkd.targets import TopKTargets
from abkd.teachers.cache.encoding import KeptEncoding
from abkd.teachers.cached import CachedTeacher

ERRORS, STEPS, STUDENTS = (Path(__file__).with_name(f"cache_{name}.csv") for name in ("errors", "steps", "students"))
POINTS = [*top_k.POINTS, JSD()]
K = 50
FORMS = {
    **{f"top_k {bits} bits, {tail}": ("top_k", bits, tail) for bits in (8, 10, 12, 16) for tail in ("lump", "uniform")},
    **{f"sampled 25 + 25, {bits} bits": ("sampled", bits, None) for bits in (8, 10, 12, 16)},
    **{f"hidden, {dtype}": ("hidden", dtype, None) for dtype in ("bfloat16", "float16", "float32")},
}
CACHED = {
    "top_k, lump": (["--targets", "top_k"], "lump"),
    "top_k, uniform": (["--targets", "top_k"], "uniform"),
    "sampled": (["--targets", "sampled"], None),
    "hidden, float16": (["--targets", "hidden", "--dtype", "float16"], None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["errors", "steps", "students"])
    parser.add_argument("--layers", type=int, default=6, help="of the student")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3, help="of the students")
    parser.add_argument("--objective", default="forward_kl", help="kind of the divergence of the steps")
    options = parser.parse_args()
    {"errors": write_errors, "steps": write_steps, "students": write_students}[options.what](options)


def write_errors(options) -> None:
    for layers in (28, 24):
        rows = top_k.read_rows(layers, 256)
        log_p = rows.teacher.log_softmax(-1)
        dense = {d: rows.measure(lambda z, d=d, p=log_p: d(student=z.log_softmax(-1), teacher=p)) for d in POINTS}
        for name, (kind, precision, tail) in FORMS.items():
            samples = [form(rows, layers, kind, precision, tail, seed) for seed in range(4 if kind == "sampled" else 1)]
            for divergence, (value, _, gradient) in dense.items():
                found = [rows.measure(lambda z, d=divergence, c=compare: c(z, d)) for _, compare in samples]
                errors = [((theirs - gradient).norm() / gradient.norm()).item() ** 2 for *_, theirs in found]
                append(ERRORS, {
                    "date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "student_layers": layers, "form": name,
                    "bytes_per_token": round(statistics.fmean(size for size, _ in samples), 1),
                    "divergence": str(divergence), "dense_value": f"{value:.6g}",
                    "value_error": f"{statistics.fmean(each[0] for each in found) / value - 1:.4g}",
                    "hidden_gradient_error": f"{statistics.fmean(errors) ** 0.5:.4g}",
                })  # fmt: skip


def form(rows: top_k.Rows, layers: int, kind: str, precision, tail, seed: int):
    """(bytes a token, the comparison of a student's logits with what was read back)."""
    if kind == "hidden":
        hidden, weight = hidden_rows(layers)
        log_p = (hidden.to(getattr(torch, precision)).float() @ weight.T).log_softmax(-1)
        size = hidden.shape[1] * getattr(torch, precision).itemsize
        return size, lambda z, d: d(student=z.log_softmax(-1), teacher=log_p)
    vocab = rows.teacher.shape[1]
    if kind == "sampled":
        encoding = KeptEncoding(vocab, precision, num_draws=K - K // 2, num_exact=K // 2)
        targets = TopKTargets.sample(
            rows.teacher, K - K // 2, num_exact=K // 2, generator=torch.Generator().manual_seed(seed)
        )
    else:
        encoding = KeptEncoding(vocab, precision)
        targets = TopKTargets.of_logits(rows.teacher, K, tail=tail)
    encoded = encoding.encode(targets)
    size = sum(tensor.numel() * tensor.element_size() for tensor in encoded.values()) / len(rows.teacher)
    return size, encoding.decode(encoded, tail or "sampled", 1.0).compare


@torch.no_grad()
def hidden_rows(layers: int):
    """The teacher's hidden states of `top_k.read_rows`, out of its logits, and its head's weight."""
    rows = top_k.read_rows(layers, 256)
    solved = torch.linalg.lstsq(rows.weight.double(), rows.teacher.double().T).solution.T
    return solved.float(), rows.weight


def write_steps(options) -> None:
    """Every teacher takes each batch in turn, in one process: whatever else the machine does meets all of them."""
    warnings.filterwarnings("ignore")
    from abkd.inputs import check_inputs
    from abkd.recipe import read_recipe
    from abkd.setup import make_student, prepare

    recipe = read_recipe("demo", [
        "teacher.remember=false", f"student.keep_layers={options.layers}", f"training.batch_size={options.batch_size}",
        f"objective.divergence={{kind: {options.objective}}}", f"training.num_steps={options.batches}",
    ])  # fmt: skip
    setup = prepare(recipe, check_inputs(recipe), print)
    student = make_student(recipe, setup, print)
    with tempfile.TemporaryDirectory() as folder:
        teachers = all_teachers(setup, Path(folder))
        trainer = _abkd(recipe, setup, student, Path(folder))
        optimizer = trainer.create_optimizer()
        seconds = {name: [] for name in teachers}
        asking = dict.fromkeys(teachers, 0.0)
        for number, batch in zip(range(options.batches + 1), trainer.get_train_dataloader(), strict=False):
            for name, teacher in teachers.items():
                whole, asked = step(trainer, optimizer, student, batch, teacher)
                if number:  # the first is a warm-up
                    seconds[name].append(whole)
                    asking[name] += asked
    for name, own in seconds.items():
        ratios = [theirs / mine for theirs, mine in zip(seconds["in process"], own, strict=True)]
        append(STEPS, {
            "date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "hardware": hardware("cpu"),
            "threads": torch.get_num_threads(), "teacher": name, "batches": len(own),
            **{each: getattr(options, each) for each in ("layers", "batch_size", "objective")},
            "seconds": round(statistics.median(own), 3), "steps_ratio": round(statistics.median(ratios), 2),
            "least_ratio": round(min(ratios), 2), "largest_ratio": round(max(ratios), 2),
            "teacher_share": round(asking[name] / sum(own), 4),
        })  # fmt: skip
        print(name, f"{statistics.median(own):.3f} s, {statistics.median(ratios):.2f} x", flush=True)


def all_teachers(setup, folder: Path) -> dict:
    """The one in the process, and those that read the caches it wrote."""
    from abkd.cli import main as abkd

    teachers = {"in process": setup.teacher}
    for name, (form, tail) in CACHED.items():
        cache = folder / form[1]
        if not cache.exists():
            assert abkd(["cache", "demo", *form, "--output", str(cache)]) == 0
        teachers[name] = CachedTeacher.open(cache, tail)
        teachers[name].expect([*setup.train, *setup.validation], {})
    return teachers


def write_students(options) -> None:
    warnings.filterwarnings("ignore")
    from dataclasses import replace

    from abkd.data.batches import Collator, batches_by_length
    from abkd.evaluation.fidelity import fidelity
    from abkd.inputs import check_inputs
    from abkd.recipe import read_recipe
    from abkd.setup import make_student, prepare
    from abkd.trainer import VALIDATION_DIVERGENCES

    setup = prepare(demo := read_recipe("demo"), check_inputs(demo), print)
    with tempfile.TemporaryDirectory() as folder:
        teachers = all_teachers(setup, Path(folder))
        for number, (seed, point, name) in enumerate(
            itertools.product(range(options.seeds), [(1.0, 0.0), (0.5, 0.5), (0.2, 0.7)], teachers)
        ):
            recipe = read_recipe("demo", [
                f"training.seed={seed}", "training.validate_every=0",
                f"objective.divergence={{kind: alpha_beta, alpha: {point[0]}, beta: {point[1]}}}",
            ])  # fmt: skip
            student = make_student(recipe, setup, print)
            (Path(folder) / str(number)).mkdir()
            _abkd(recipe, replace(setup, teacher=teachers[name]), student, Path(folder) / str(number)).train()
            batches = batches_by_length(setup.validation, Collator.of(setup.tokenizer), 4)
            found = fidelity(student, setup.teacher.targets, batches, VALIDATION_DIVERGENCES)
            append(STUDENTS, {
                "date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "teacher": name, "alpha": point[0],
                "beta": point[1], "seed": seed, "steps": recipe.training.num_steps,
                **{key: f"{value:.4f}" for key, value in found.items() if key != "num_tokens"},
            })  # fmt: skip
            print(name, point, seed, found, flush=True)


def step(trainer, optimizer, student, batch, teacher) -> tuple[float, float]:
    """(seconds of a whole step, seconds in which the teacher was asked)."""
    spent, targets = [0.0], teacher.targets

    def timed(**asked):
        started = time.perf_counter()
        found = targets(**asked)
        spent[0] += time.perf_counter() - started
        return found

    trainer.teacher, teacher.targets = teacher, timed
    count = (batch["labels"][:, 1:] >= 0).sum()
    started = time.perf_counter()
    trainer.training_step(student, dict(batch), count)
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    whole = time.perf_counter() - started
    del teacher.targets
    return whole, spent[0]


def append(file: Path, row: dict) -> None:
    is_new = not file.exists()
    with file.open("a", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, row, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
