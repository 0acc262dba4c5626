"""Does a training step fit into memory, and which options make it fit."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from abkd import config
from abkd.config import LanguageRecipe
from abkd.data.batches import num_tokens
from abkd.data.instructions import Example
from abkd.divergences import AlphaBetaSchedule
from abkd.engine import device_type
from abkd.kernels.memory import Step, StepMemory, step_memory
from abkd.models.pretrained import load_skeleton
from abkd.models.students import shrink
from abkd.parts import freeze, make_objective
from abkd.recipe import parse_recipe

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_CGROUP = Path("/sys/fs/cgroup")


def say_memory(recipe: LanguageRecipe, say: Callable[[str], None], train: Sequence[Example] = ()) -> None:
    """What a training step needs, and what to change where it does not fit; see `step_memory_of`."""
    if reason := _not_simulated(recipe):
        say(f"memory: what a training step needs is not known, because {reason}")
        return
    try:
        lines = advice(recipe, lambda changed: step_memory_of(changed, train), free_bytes(device_of(recipe)))
    except Exception as error:  # a model's own code runs on tensors without values, which not every model bears
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        lines = [f"memory: what a training step needs is not known ({reason})"]
    for line in lines:
        say(line)


def _not_simulated(recipe: LanguageRecipe) -> str:
    """Why `step_memory_of` would be wrong; empty where it is right."""
    if any(getattr(teacher, "quantization", "none") != "none" for teacher in recipe.teachers):
        return "the teacher is quantised"
    if isinstance(recipe.teacher, config.Mixture):
        return "there are several teachers"
    if recipe.student.lora:  # peft does not bear tensors without values
        return "student.lora trains an adapter"
    if recipe.training.engine != "ddp":
        return f"training.engine={recipe.training.engine} shards it"
    return ""


def step_memory_of(recipe: LanguageRecipe, train: Sequence[Example] = ()) -> StepMemory:
    """Of the longest batch that `train` can give; without examples, of a batch of data.max_tokens each."""
    size = recipe.training.batch_size
    lengths = sorted(map(num_tokens, train))[-size:] or [recipe.data.max_tokens] * size
    completions = sorted(len(example.completion_ids) for example in train)[-size:] or lengths
    if recipe.rollouts.kind != "fixed":  # a sampled completion may be the longest
        longest = max([recipe.data.max_prompt_tokens] if not train else [len(example.prompt_ids) for example in train])
        lengths = [max(length, longest + recipe.rollouts.max_new_tokens) for length in lengths]
        completions = [max(length, recipe.rollouts.max_new_tokens) for length in completions]
    if recipe.data.corpus:  # the blocks' forward and that of the examples wait for one backward
        corpus_tokens = recipe.data.corpus_tokens
        lengths = [*[max(lengths[-1], corpus_tokens)] * size, *lengths]
        completions += [corpus_tokens - 1] * size
    objective = make_objective(recipe.objective).at(1.0)

    def make_models() -> tuple[PreTrainedModel, PreTrainedModel | None]:
        teacher = None  # one that is cached or served takes no memory here
        if isinstance(named := recipe.teacher, config.InProcess):
            teacher = load_skeleton(named.path, "teacher.path", named.dtype)
        match recipe.student:
            case config.Shrink(path=path) as section:
                source = load_skeleton(path, "student.path") if path else teacher
                student = shrink(source, section.layers or section.keep_layers).float()
            case config.Pretrained(path=path):
                student = load_skeleton(path, "student.path")
        freeze(student, recipe.student)
        if recipe.training.activation_checkpointing:
            getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)()
        return student.train(), teacher

    def dense_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        logits = {"student_logits": student_logits, "teacher_logits": teacher_logits}
        return objective(**logits, labels=labels, num_tokens=len(labels)).total

    is_dense = recipe.training.logits == "dense" or objective.needs_logits
    loss = dense_loss if is_dense else objective.divergence
    assert loss is not None and not isinstance(loss, AlphaBetaSchedule)
    step = Step(
        batch_size=len(lengths),
        length=max(lengths),
        num_tokens=sum(completions),
        loss=loss,
        autocast=AUTOCAST[recipe.training.precision],
        accumulates=recipe.training.accumulation > 1,
        device=device_of(recipe),
    )
    return step_memory(make_models, step)


def advice(recipe: LanguageRecipe, estimate: Callable[[LanguageRecipe], StepMemory], free: int) -> list[str]:
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


def _savings(recipe: LanguageRecipe) -> Iterator[dict[str, Any]]:
    """Overrides that save memory and change little else, the mildest first."""
    if recipe.training.logits == "dense":
        yield {"training.logits": "auto"}
    if isinstance(recipe.teacher, config.InProcess) and recipe.teacher.dtype == "float32":
        yield {"teacher.dtype": "bfloat16"}
    size, accumulation = recipe.training.batch_size, recipe.training.accumulation
    if not recipe.training.activation_checkpointing:
        yield {"training.activation_checkpointing": True}
    while size > 1:
        size, accumulation = -(-size // 2), accumulation * 2
        yield {"training.batch_size": size, "training.accumulation": accumulation}


def _changed(recipe: LanguageRecipe, changes: dict[str, Any]) -> LanguageRecipe:
    content = recipe.to_dict()
    for key, value in changes.items():
        section, _, name = key.partition(".")
        content[section][name] = value
    changed = parse_recipe(content)
    assert isinstance(changed, LanguageRecipe)
    return changed


def device_of(recipe: LanguageRecipe) -> torch.device:
    """Where the recipe trains."""
    return torch.device(device_type(recipe.training))


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
