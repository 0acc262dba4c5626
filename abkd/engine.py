"""Where and how the ranks train: what a launch and a recipe must agree on, and what the Trainer is told of it.

The recipe says everything that changes a number. A launcher starts processes and nothing else: what it asks for beside
that would be ignored, or would change the run behind the recipe's back, and is refused.
"""

import os
from collections.abc import Iterator
from typing import Any

from abkd import ranks
from abkd.config import Training
from abkd.errors import InputError

_PLUGINS = {
    "FSDP": "training.engine=fsdp2",
    "DEEPSPEED": "training.engine=zero2",
    "MEGATRON_LM": "training.engine=fsdp2",
    "PARALLELISM_CONFIG": "training.engine=fsdp2",
}
"""What `accelerate launch` may switch on by ACCELERATE_USE_... -> what a recipe says instead."""
ZERO_2 = {
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
}
"""DeepSpeed's configuration; the Trainer fills in what is auto."""


def check_launcher(training: Training) -> None:
    """Refuses a launch that asks for what is the recipe's to say, or that would be ignored.

    Reads the environment alone: it comes before the processes join.

    Raises:
        InputError: names the variable, and what to do instead.
    """
    for problem in _launcher_problems(training):
        raise InputError(f"launch: {problem}")


def _launcher_problems(training: Training) -> Iterator[str]:
    found = os.environ.get
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if by_accelerate and "MASTER_PORT" in os.environ and "RANK" not in os.environ:
        yield (
            "accelerate launch --cpu starts one process, however many it is asked for; "
            "use torchrun --nproc-per-node N -m abkd ..."
        )
    if ranks.num_ranks() > 1 and not {"RANK", "LOCAL_RANK"} <= os.environ.keys():
        yield f"WORLD_SIZE={ranks.num_ranks()} without RANK and LOCAL_RANK; use torchrun --nproc-per-node N -m abkd ..."
    for plugin, instead in _PLUGINS.items():
        if _is_true(found(f"ACCELERATE_USE_{plugin}")):
            yield f"ACCELERATE_USE_{plugin}=true is refused: set {instead} in the recipe, and launch without it"
    if found("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        yield f"ACCELERATE_DYNAMO_BACKEND={found('ACCELERATE_DYNAMO_BACKEND')} is not supported; launch without it"
    precision = found("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", training.precision):
        yield (
            f"ACCELERATE_MIXED_PRECISION={precision} and training.precision={training.precision} differ; "
            "say it in the recipe, and launch without it"
        )
    steps = found("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", str(training.accumulation)):
        yield (
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps} and training.accumulation={training.accumulation} differ; "
            "say it in the recipe, and launch without it"
        )
    if _is_true(found("ACCELERATE_USE_CPU")) and training.device == "auto":
        yield "ACCELERATE_USE_CPU=true and training.device=auto differ; set training.device=cpu"


def check_engine(training: Training) -> None:
    """Refuses an engine or a precision that this machine or this launch cannot give.

    Raises:
        InputError: names the field, and what to do instead.
    """
    on_gpu = device_type(training) == "cuda"
    if training.precision == "fp16" and not on_gpu:
        raise InputError("training.precision: fp16 needs a GPU, and there is none; use bf16 or fp32")
    if training.engine == "ddp":
        return
    if not on_gpu:
        raise InputError(
            f"training.engine: {training.engine} needs GPUs, and on a CPU it would be ignored; use training.engine=ddp"
        )
    if ranks.num_ranks() == 1:
        raise InputError(
            f"training.engine: {training.engine} shards over processes, and this is one; "
            "start several with torchrun --nproc-per-node N -m abkd ..."
        )


def device_type(training: Training) -> str:
    """cuda or cpu: where the recipe trains."""
    import torch

    return "cuda" if training.device == "auto" and torch.cuda.is_available() else "cpu"


def trainer_options(training: Training) -> dict[str, Any]:
    """What `TrainingArguments` get for precision, device and engine."""
    options: dict[str, Any] = {
        "bf16": training.precision == "bf16",
        "fp16": training.precision == "fp16",
        # without a GPU several processes find each other only where the CPU is asked for
        "use_cpu": training.device == "cpu" or (ranks.num_ranks() > 1 and device_type(training) == "cpu"),
        "gradient_checkpointing": training.activation_checkpointing,
    }
    if training.engine == "fsdp2":
        checkpointing = options.pop("gradient_checkpointing")  # under FSDP it is FSDP's
        options |= {"fsdp": True, "fsdp_config": {"version": 2, "activation_checkpointing": checkpointing}}
    elif training.engine == "zero2":
        options["deepspeed"] = ZERO_2
    return options


def describe(training: Training) -> str:
    """One line: how many processes, what they share, where, in which precision."""
    names = {"ddp": "each with the whole student", "fsdp2": "student and teacher sharded", "zero2": "ZeRO-2"}
    count = ranks.num_ranks()
    processes = "one process" if count == 1 else f"{count} processes, {names[training.engine]}"
    examples = training.batch_size * training.accumulation * count
    return f"engine: {processes}, on {device_type(training)}, {training.precision}, {examples} examples per step"


def _is_true(value: str | None) -> bool:
    return (value or "").lower() in ("1", "true", "yes", "on", "y", "t")
