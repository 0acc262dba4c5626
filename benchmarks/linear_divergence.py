"""Head, divergence and gradient: every path of abkd and its peers on the same inputs, each in a process of its own.

    python benchmarks/linear_divergence.py                      # every method, divergence and shape; appends to the CSV
    python benchmarks/linear_divergence.py --methods "chunked;plain torch" --shapes 2048x256x50304 --repeats 5
    python benchmarks/linear_divergence.py --shapes SCALING --methods "chunked;plain torch" --divergences forward_kl
    python benchmarks/linear_divergence.py --device cuda --shapes 8192x4096x128256 --dtypes bfloat16
    python benchmarks/linear_divergence.py --plot               # draws the CSV again

Time: from hidden states to the gradients of student hidden states and student weight; median of the repeats, and
median of its ratio to the floor: the four matrix products that cannot be avoided (two logits, two gradients), done
dense in torch in the tensors' own dtype, in the same process between the repeats. Memory: the peak above what inputs
and library hold, gradients included (resident on a CPU, allocated on a GPU). Error: relative L2 of the two gradients
against fp64 on a small problem of the same dtype.

Peers are optional: pip install -c constraints.txt -e '.[bench]', and without their dependencies
pip install --no-deps liger-kernel==0.8.5 torchtune==0.6.1 torchao==0.9.0 omegaconf antlr4-python3-runtime==4.9.3
sentencepiece tiktoken. A peer that is not there, or cannot do a
divergence, has no row.
"""

import argparse
import csv
import datetime
import importlib.util
import itertools
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

CSV = Path(__file__).with_name("linear_divergence.csv")
SHAPES = ("2048x256x50304", "1024x576x49152", "512x2048x151936")
SCALING = (
    "512x256x50304", "1024x256x50304", "2048x256x50304", "4096x256x50304", "8192x256x50304",  # in N
    "1024x256x16384", "1024x256x32768", "1024x256x65536", "1024x256x131072",  # in V
)  # fmt: skip
DIVERGENCES = ("alpha_beta", "forward_kl", "reverse_kl", "jsd")
FIELDS = (
    "date", "commit", "hardware", "threads", "torch", "method", "divergence", "dtype", "tokens", "hidden", "vocab",
    "repeats", "seconds", "seconds_spread", "floor_seconds", "times_the_floor", "extra_mib", "gradients_mib",
    "hidden_error", "weight_error",
)  # fmt: skip


def abkd_path(path, step=None):
    def make(divergence):
        from abkd.divergences import JSD, AlphaBeta, ForwardKL, ReverseKL
        from abkd.head import LMHead
        from abkd.kernels import chunked, linear_divergence
        from abkd.targets import HiddenTargets

        kinds = {"alpha_beta": AlphaBeta(), "forward_kl": ForwardKL(), "reverse_kl": ReverseKL(), "jsd": JSD()}
        if step is not None:
            if divergence == "jsd":
                return None
            chunked._choose_step = lambda *arguments, **options: getattr(chunked, step)

        def total(hidden, weight, teacher_hidden, teacher_weight):
            return linear_divergence(
                hidden,
                LMHead(weight),
                HiddenTargets(teacher_hidden, LMHead(teacher_weight)),
                divergence=kinds[divergence],
                token_weights=torch.full((len(hidden),), 1 / len(hidden), device=hidden.device),
                path=path,
            ).total

        return total

    return make


def dense(loss):
    """A loss of logits `[N, vocab]` of student and teacher."""

    def make(divergence):
        function = loss(divergence)
        if function is None:
            return None
        return lambda hidden, weight, teacher, teacher_weight: function(hidden @ weight.T, teacher @ teacher_weight.T)

    return make


def plain_kl(divergence):
    if divergence == "forward_kl":
        return lambda q, p: torch.nn.functional.kl_div(
            q.float().log_softmax(-1), p.float().log_softmax(-1), log_target=True, reduction="batchmean"
        )
    if divergence == "reverse_kl":
        return lambda q, p: torch.nn.functional.kl_div(
            p.float().log_softmax(-1), q.float().log_softmax(-1), log_target=True, reduction="batchmean"
        )
    return None


def three_powers(divergence):
    """The alpha-beta-divergence as its definition reads."""
    if divergence != "alpha_beta":
        return None

    def loss(student, teacher, a=0.2, b=0.7):
        q, p = student.float().softmax(-1), teacher.float().softmax(-1)
        s = a + b
        return -(p**a * q**b - a / s * p**s - b / s * q**s).sum(-1).mean() / (a * b)

    return loss


def compiled_kl(divergence):
    function = plain_kl(divergence)
    return function and torch.compile(function)


def trl_gkd(divergence):
    from trl.experimental.gkd import GKDTrainer

    betas = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
    if divergence not in betas:
        return None
    return lambda q, p: GKDTrainer.generalized_jsd_loss(q[None], p[None], beta=betas[divergence])


def torchtune(divergence):
    from torchtune.modules.loss import ForwardKLLoss, ReverseKLLoss

    losses = {"forward_kl": ForwardKLLoss, "reverse_kl": ReverseKLLoss}
    if divergence not in losses:
        return None
    loss = losses[divergence]()
    return lambda q, p: loss(q[None], p[None], torch.zeros(1, len(q), dtype=torch.long, device=q.device))


def trl_chunked(divergence):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    betas = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
    if divergence not in betas:
        return None

    def total(hidden, weight, teacher, teacher_weight):
        beta = betas[divergence]
        arguments = (hidden, weight, None, teacher, teacher_weight, None, beta, 1.0, 1.0, None, 1.0, None)
        return ChunkedDivergenceFunction.apply(*arguments)[0].mean()

    return total


def liger(chunk_size):
    def make(divergence):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        betas = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
        if divergence not in betas:
            return None
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=betas[divergence], compiled=False, chunk_size=chunk_size
        )

        def total(hidden, weight, teacher, teacher_weight):
            labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
            result = loss(hidden, weight, teacher, teacher_weight, labels)
            return result[0] if isinstance(result, tuple) else result

        return total

    return make


METHODS = {
    "chunked": abkd_path("chunked"),
    "triton": abkd_path("triton"),
    "chunked, no compiler": abkd_path("chunked", "torch_step"),
    "reference": abkd_path("reference"),
    "plain torch": dense(plain_kl),
    "plain torch, compiled": dense(compiled_kl),
    "three powers": dense(three_powers),
    "TRL chunked": trl_chunked,
    "TRL GKD": dense(trl_gkd),
    "Liger, chunk 256": liger(256),
    "Liger, chunk 1024": liger(1024),
    "torchtune": dense(torchtune),
}
PACKAGES = {"TRL": "trl", "Liger": "liger_kernel", "torchtune": "torchtune"}


def inputs(tokens, hidden, vocab, dtype, device="cpu"):
    torch.manual_seed(0)
    made = [torch.randn(n, hidden) for n in (tokens, vocab, tokens, vocab)]
    made[1] *= 3 / hidden**0.5
    made[3] *= 3 / hidden**0.5
    tensors = [x.to(device, dtype) for x in made]
    return [tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:]]


def gradients(total, tensors):
    return torch.autograd.grad(total(*tensors), tensors[:2])


def resident_mib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def peak_mib(work, device):
    """Of the memory while `work` runs, above that before."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before, peak, done = resident_mib(), 0.0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = work()
    done.set()
    watcher.join()
    del result
    return peak - before


def seconds(work, device):
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def errors(make, divergence, dtype, device):
    """Relative L2 of both gradients against fp64 of the same rounded inputs, N=64, H=128, V=4096."""
    tensors = inputs(64, 128, 4096, dtype, device)
    truth = gradients(abkd_path("reference")(divergence), [x.detach().double().requires_grad_() for x in tensors])
    found = gradients(make(divergence), tensors)
    size = [
        (x.double() @ y.reshape(-1)) / (y.norm() ** 2)
        for x, y in zip((g.reshape(-1) for g in found), truth, strict=True)
    ]
    # a mean or a sum, in nats or halves: the scale is the method's own, the direction and proportions are compared
    return [((x.double() / s - y).norm() / y.norm()).item() for x, y, s in zip(found, truth, size, strict=True)]


def measure_one(job):
    tokens, hidden, vocab = job["shape"]
    dtype, device = getattr(torch, job["dtype"]), job["device"]
    total = METHODS[job["method"]](job["divergence"])
    if total is None:
        return None
    hidden_error, weight_error = errors(METHODS[job["method"]], job["divergence"], dtype, device)
    tensors = inputs(tokens, hidden, vocab, dtype, device)
    gradients(total, tensors)  # warms up, compiles
    extra = peak_mib(lambda: gradients(total, tensors), device)
    q, w, p, v = (x.detach() for x in tensors)

    def products():
        logits, teacher = q @ w.T, p @ v.T
        return logits @ w, teacher.T @ q

    times, floors = [], []
    for _ in range(job["repeats"]):
        floors.append(seconds(products, device))
        times.append(seconds(lambda: gradients(total, tensors), device))
    return {
        "seconds": round(statistics.median(times), 3),
        "seconds_spread": round(max(times) - min(times), 3),
        "floor_seconds": round(statistics.median(floors), 3),
        "times_the_floor": round(statistics.median(t / f for t, f in zip(times, floors, strict=True)), 3),
        "extra_mib": round(extra),
        "gradients_mib": round((tokens + vocab) * hidden * dtype.itemsize / 2**20),
        "hidden_error": f"{hidden_error:.1e}",
        "weight_error": f"{weight_error:.1e}",
    }


def git_commit():
    """Of the code; the figures themselves may have grown since."""
    git = ["git", "-C", str(CSV.parent.parent)]
    commit = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "abkd", "benchmarks/*.py"], capture_output=True, text=True)
    return (commit or "unknown") + ("-dirty" if changed.stdout else "")


def check_the_tests_are_green(device):
    tests = CSV.parent.parent / "tests" / "kernels"
    files = ["test_linear_divergence.py"] if device == "cpu" else ["test_linear_divergence.py", "test_triton.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *(str(tests / file) for file in files)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        sys.exit("the kernel tests are red: no figures before they are green (pytest tests/kernels)")


def hardware(device):
    if device != "cpu":
        return torch.cuda.get_device_name()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip()}, {len(names)} cores" if names else platform.processor()


def run(options):
    check_the_tests_are_green(options.device)
    common = {
        "date": datetime.date.today().isoformat(), "commit": git_commit(), "hardware": hardware(options.device),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "repeats": options.repeats,
    }  # fmt: skip
    if not CSV.exists():
        CSV.write_text(",".join(FIELDS) + "\n", encoding="utf-8")
    lists = (options.shapes, options.dtypes, options.divergences, options.methods)
    if options.shapes == "SCALING":
        lists = (";".join(SCALING), *lists[1:])
    for shape, dtype, divergence, method in itertools.product(*(text.split(";") for text in lists)):
        if method == "triton" and options.device == "cpu":
            continue
        package = next((name for peer, name in PACKAGES.items() if method.startswith(peer)), "abkd")
        if importlib.util.find_spec(package) is None:
            print(f"{method}: {package} is not installed")
            continue
        job = {
            "shape": [int(x) for x in shape.split("x")], "dtype": dtype, "divergence": divergence, "method": method,
            "repeats": options.repeats, "device": options.device,
        }  # fmt: skip
        done = subprocess.run([sys.executable, __file__, "--one", json.dumps(job)], capture_output=True, text=True)
        if done.returncode != 0:
            print(f"{method}, {divergence}, {shape}, {dtype}: failed: {done.stderr.strip().splitlines()[-1:]}")
            continue
        found = json.loads(done.stdout.strip().splitlines()[-1])
        if found is None:
            continue
        tokens, hidden, vocab = job["shape"]
        row = common | found | {"method": method, "divergence": divergence, "dtype": dtype}
        row |= {"tokens": tokens, "hidden": hidden, "vocab": vocab}
        with CSV.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, FIELDS).writerow(row)
        print(
            f"{shape:>16} {dtype:8} {divergence:11} {method:22} {found['seconds']:7.2f} s "
            f"{found['times_the_floor']:6.2f} x floor {found['extra_mib']:6} MiB  error {found['weight_error']}",
            flush=True,
        )
    plot()


def plot():
    """Draws the CSV's last fp32 row on a CPU of every method and shape: three shapes, two scalings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with CSV.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["dtype"] == "float32" and "cores" in row["hardware"]]
    last = {(r["tokens"], r["hidden"], r["vocab"], r["method"], r["divergence"]): r for r in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    for axis, shape in zip(axes[0], SHAPES, strict=True):
        for (*where, method, divergence), row in last.items():
            if "x".join(where) == shape:
                point = float(row["times_the_floor"]), float(row["extra_mib"])
                axis.plot(*point, "os^D"[DIVERGENCES.index(divergence)], color=colour(methods, method), label=method)
        axis.set(title=f"N, H, V = {shape.replace('x', ', ')}", xlabel="time / four matrix products", yscale="log")
        axis.set(ylabel="extra peak memory, MiB")
        axis.set_xlim(left=0.9)
    for axis, name, fixed in ((axes[1][0], "tokens", "50304"), (axes[1][1], "vocab", "1024")):
        for method in methods:
            here = {
                int(r[name]): float(r["extra_mib"]) for key, r in last.items()
                if "x".join(key[:3]) in SCALING and fixed in key[:3] and key[3:] == (method, "forward_kl")
                and float(r["extra_mib"]) > 0
            }  # fmt: skip
            if len(here) > 2:
                axis.plot(*zip(*sorted(here.items()), strict=True), "o-", color=colour(methods, method), label=method)
        other = "V = 50,304" if name == "tokens" else "N = 1,024"
        axis.set(title=f"forward KL, H = 256, {other}", xlabel=name, xscale="log", yscale="log")
        axis.set(ylabel="extra peak memory, MiB")
        axis.minorticks_off()
    axes[1][2].axis("off")
    handles = {h.get_label(): h for axis in axes.flat for h in axis.get_lines()}
    axes[1][2].legend(
        handles.values(),
        handles.keys(),
        title="circle α-β, square forward KL,\ntriangle reverse KL, diamond JSD",
        loc="center",
    )
    figure.savefig(CSV.with_suffix(".png"), dpi=80)


def colour(methods, method):
    return f"C{methods.index(method) % 10}" if methods.index(method) < 10 else "black"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("methods", METHODS), ("shapes", SHAPES), ("divergences", DIVERGENCES), ("dtypes", ("float32",)),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", default=";".join(default), help="separated by semicolons")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_one(json.loads(options.one))))
    elif options.plot:
        plot()
    else:
        run(options)


if __name__ == "__main__":
    main()
