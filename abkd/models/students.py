"""Students made out of their teacher."""

import copy
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from abkd.errors import InputError


def shrink(teacher: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """The teacher's architecture with some of its layers, weights copied. A tied head stays tied.

    Args:
        teacher: a decoder of one stack of alike layers (Llama, GPT-2, Qwen, Mistral, Gemma, ...).
        layers: which, by number, the first is 0; or how many, evenly spaced, first and last included where 2 or more.

    Returns:
        A new model in the teacher's dtype that shares no storage with it, in evaluation mode.
    """
    path, stack = layer_stack(
        teacher, "student.kind=shrink", "give the student as a checkpoint (student.kind=pretrained)"
    )
    kept = kept_layers(len(stack), layers) if isinstance(layers, int) else list(layers)
    if not kept or max(kept) >= len(stack) or min(kept) < 0 or kept != sorted(set(kept)):
        raise InputError(
            f"student.layers={kept}: must rise, between 0 and {len(stack) - 1}, as the teacher has {len(stack)} layers"
        )
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(kept)
    for name, value in list(vars(config).items()):  # layer_types and its like say something of each layer
        if "layer" in name and isinstance(value, list) and len(value) == len(stack):
            setattr(config, name, [value[index] for index in kept])
    student = type(teacher)._from_config(config, dtype=teacher.dtype)  # .to(dtype) would round the rotary frequencies
    renamed = {f"{path}.{source}.": f"{path}.{target}." for target, source in enumerate(kept)}
    state = {}
    for name, tensor in teacher.state_dict().items():
        if not name.startswith(f"{path}."):
            state[name] = tensor
        for source, target in renamed.items():
            if name.startswith(source):
                state[target + name.removeprefix(source)] = tensor
    student.load_state_dict(state)
    student.tie_weights()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def kept_layers(num_layers: int, keep: int) -> list[int]:
    """`keep` evenly spaced indices out of `num_layers`, first and last included; the first alone for 1."""
    if not 1 <= keep <= num_layers:
        raise InputError(f"student.keep_layers={keep}: the teacher has {num_layers} layers; use 1 to {num_layers}")
    return [round(index * (num_layers - 1) / max(keep - 1, 1)) for index in range(keep)]


def layer_stack(model: PreTrainedModel, field: str, way_out: str) -> tuple[str, nn.ModuleList]:
    """The one list of decoder layers and its path in the state dict; `field` and `way_out` are for the error."""
    num_layers = getattr(model.config, "num_hidden_layers", None)
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and len({type(layer) for layer in module}) == 1
    ]
    if len(stacks) != 1:
        raise InputError(
            f"{field}: {type(model).__name__} has {len(stacks)} stacks of decoder layers, needs exactly one; {way_out}"
        )
    return stacks[0]
