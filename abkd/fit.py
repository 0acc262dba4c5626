"""Does a training step fit into memory, and which options make it fit."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from abkd.config import Recipe, parse_recipe
from abkd.kernels.memory import StepMemory

_CGROUP = Path("/sys/fs/cgroup")


def advice(recipe: Recipe, estimate: Callable[[Recipe], StepMemory], free: int) -> list[str]:
    """Lines for the user: what a step needs, and where that is more than `free` bytes, overrides with which it fits."""
    needed = estimate(recipe)
    lines = [f"memory: a training step needs {needed}; {free / 2**30:.1f} GiB are free"]
    changes: dict[str, Any] = {}
    savings = _savings(recipe)
    while needed.peak > free and (change := next(savings, None)):
        tried = estimate(_changed(recipe, changes | change))
        if tried.peak < needed.peak:
            changes, needed = changes | change, tried
    if changes:
        options = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
        lines.append(f"memory: that is more than is free; with {options} it is {needed.peak / 2**30:.2f} GiB")
    if needed.peak > free:
        lines.append("memory: no option makes it fit; take a smaller student or teacher, or shorter data.max_tokens")
    return lines


def _savings(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Overrides that save memory and change little else, the mildest first."""
    if recipe.training.logits == "dense":
        yield {"training.logits": "auto"}
    if recipe.teacher and recipe.teacher.dtype == "float32":
        yield {"teacher.dtype": "bfloat16"}
    size, accumulation = recipe.training.batch_size, recipe.training.accumulation
    if not recipe.training.activation_checkpointing:
        yield {"training.activation_checkpointing": True}
    while size > 1:
        size, accumulation = -(-size // 2), accumulation * 2
        yield {"training.batch_size": size, "training.accumulation": accumulation}


def _changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    content = recipe.to_dict()
    for key, value in changes.items():
        section, _, name = key.partition(".")
        content[section][name] = value
    return parse_recipe(content)


def device_of(recipe: Recipe) -> torch.device:
    """Where the recipe trains."""
    return torch.device("cuda" if recipe.training.device == "auto" and torch.cuda.is_available() else "cpu")


def free_bytes(device: torch.device) -> int:
    """Of the device's memory; on a CPU no more than the container's limit leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit, used = ((_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no such limit: the file is not there, or says "max"
        return free
