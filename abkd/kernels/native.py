"""`rows.c`, compiled once with the machine's C compiler into the user's cache; absent where there is none."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("rows.c")
_NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
_FLAGS = ["-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
_FLAGS += ["-fassociative-math", "-ffp-contract=fast"]


@functools.cache
def library() -> ctypes.CDLL | str:
    """The compiled kernel, or one line that says why there is none."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "no C compiler (cc, gcc, clang or $CC)"
    reasons = []
    for openmp in (True, False):  # without it one thread does the rows
        try:
            loaded = ctypes.CDLL(str(_build(compiler, openmp)))
            break
        except subprocess.CalledProcessError as error:
            message = error.stderr.strip() or "no message"
            reasons.append(f"{compiler} cannot compile {SOURCE.name}: {message.splitlines()[0]}")
        except (OSError, RuntimeError) as error:  # no folder to write to, or no home
            reasons.append(f"{SOURCE.name} cannot be built or loaded: {error}")
    else:
        return reasons[-1]
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

    skipped = kernel.alpha_beta_rows(
        *pointers, num_rows, vocab, torch.get_num_threads(), alpha, beta, student_scale, teacher_scale
    )
    return None if skipped else (divergence, entropy, cross_entropy)


def _build(compiler: str, openmp: bool) -> Path:
    """The library in the user's cache, compiled if it is not there."""
    compile_flags, link_flags = [*_FLAGS, _NATIVE], ["-shared", "-lm"]
    if openmp:
        compile_flags.append("-fopenmp")
        link_flags.append(_openmp_runtime())
    key = "\n".join([compiler, *compile_flags, *link_flags, SOURCE.read_text(encoding="utf-8"), _processor()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "abkd"
    built = folder / f"rows-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            commands = (
                [compiler, *compile_flags, "-c", str(SOURCE), "-o", f"{aside}/rows.o"],
                [compiler, f"{aside}/rows.o", *link_flags, "-o", f"{aside}/rows.so"],
            )
            for command in commands:
                subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(f"{aside}/rows.so", built)
    return built


def _openmp_runtime() -> str:
    """Torch's own, whose threads are awake already: those of a second one would compete with them for the cores."""
    return next((str(file) for file in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")), "-fopenmp")


def _processor() -> str:
    """What the compiled code depends on: two machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return platform.platform() + platform.processor()
