"""`rows.c`, compiled once with the machine's C compiler into the user's cache; absent where there is none."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("rows.c")
_FLAGS = ["-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
_FLAGS += ["-fassociative-math", "-ffp-contract=fast"]


@functools.cache
def library() -> ctypes.CDLL | str:
    """The compiled kernel, or one line that says why there is none."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "no C compiler (cc, gcc, clang or $CC)"
    target = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    command = [compiler, *_FLAGS, target, str(SOURCE), "-lm"]
    key = hashlib.sha256("\n".join([*command, SOURCE.read_text(encoding="utf-8"), _processor()]).encode()).hexdigest()
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "abkd"
        folder.mkdir(parents=True, exist_ok=True)
        built = folder / f"rows-{key[:16]}.so"
        if not built.exists():
            with tempfile.TemporaryDirectory(dir=folder) as aside:
                part = Path(aside) / "rows.so"
                subprocess.run([*command, "-o", str(part)], check=True, capture_output=True, text=True)
                os.replace(part, built)
        loaded = ctypes.CDLL(str(built))
    except subprocess.CalledProcessError as error:
        return f"{compiler} cannot compile {SOURCE.name}: {(error.stderr.strip() or 'no message').splitlines()[0]}"
    except OSError as error:
        return f"{SOURCE.name} cannot be built or loaded: {error}"
    loaded.alpha_beta_rows.restype = ctypes.c_int64
    loaded.alpha_beta_rows.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_int64] * 3 + [ctypes.c_float] * 4
    return loaded


def alpha_beta_rows(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    ce_weights: Tensor | None,
    labels: Tensor | None,
    *,
    alpha: float,
    beta: float,
    student_scale: float,
    teacher_scale: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Divergence, entropy and cross-entropy `[rows]` of logits `[rows, vocab]`, on all of torch's threads.

    Writes the gradient over `student` and scratch over `teacher`. All fp32 on the CPU, contiguous; labels int64.
    None, with the logits destroyed, where a logit is -inf: that row's limits are for another path.
    """
    kernel = library()
    assert isinstance(kernel, ctypes.CDLL)
    num_rows, vocab = student.shape
    divergence, entropy, cross_entropy = torch.zeros(3, num_rows)
    tensors = (student, teacher, weights, ce_weights, labels, divergence, entropy, cross_entropy)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]

    def run(start: int, stop: int) -> int:
        return kernel.alpha_beta_rows(*pointers, start, stop, vocab, alpha, beta, student_scale, teacher_scale)

    num_threads = min(torch.get_num_threads(), num_rows)
    edges = [num_rows * i // num_threads for i in range(num_threads + 1)]
    with ThreadPoolExecutor(num_threads) as pool:  # the kernel runs without Python's lock
        skipped = sum(pool.map(run, edges[:-1], edges[1:]))
    return None if skipped else (divergence, entropy, cross_entropy)


def _processor() -> str:
    """What the compiled code depends on: two machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return platform.platform() + platform.processor()
