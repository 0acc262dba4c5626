"""LoRA through peft: an adapter put on a model, merged into it, read from a folder."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from abkd.errors import InputError
from abkd.models.pretrained import check_safetensors, load_model
from abkd.paths import find_path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def find_adapter(path: str, field: str) -> Path | None:
    """The folder that `path` names, checked to hold a whole adapter; None when it is a model hub id.

    Raises:
        InputError: there is no such folder, or no adapter in it.
    """
    folder = find_path(path, field)
    if not folder.exists() and not path.startswith((".", "/", "~")) and path.count("/") == 1:
        return None
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{field}: {path!r} holds no {name}; give the folder of a LoRA adapter, as peft writes it")
    try:
        json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{field}: {folder / CONFIG} is not valid JSON; copy the folder again") from None
    check_safetensors(folder / WEIGHTS, field)
    return folder


def add_lora(
    model: Any, *, rank: int, alpha: float, dropout: float, targets: Literal["all-linear"] | tuple[str, ...]
) -> Any:
    """`model` with a new adapter, which alone is trained; it does nothing until it is.

    Args:
        rank, alpha, dropout: the update of a weight is alpha / rank * B A, of inputs of which a share is dropped.
        targets: names of linear layers; all-linear is every one but the output head.

    Raises:
        InputError: no layer is named so.
    """
    import peft
    from transformers.pytorch_utils import Conv1D

    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(f"student.lora.targets: {list(targets)} is refused: {reason}; use all-linear") from error


def is_adapted(model: Any) -> bool:
    return hasattr(model, "peft_config")


def merged(model: Any) -> Any:
    """The plain model with the adapter's updates in its weights; the adapted one is used up."""
    return model.merge_and_unload().requires_grad_(True) if is_adapted(model) else model


def merged_weights(model: Any) -> Iterator[tuple[str, Any]]:
    """Names and tensors of `merged(model)`, one after the other; the model stays as it is."""
    inner = model.get_base_model() if is_adapted(model) else model
    for name, weight in inner.state_dict().items():
        owner, _, leaf = name.rpartition(".base_layer.")
        if owner and leaf == "weight":
            layer = inner.get_submodule(owner)
            weight = weight + sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), weight


def load_trained(student: Any, folder: Path) -> Any:
    """`student` with the weights in a checkpoint or a student's folder: an adapter, or all; all of them replace one."""
    if is_adapted(student) and (folder / WEIGHTS).exists():
        student.load_adapter(str(folder), student.active_adapter)
        return student
    whole = load_model(str(folder), "run_dir")
    if is_adapted(student):
        return whole.to(student.device)
    student.load_state_dict(whole.state_dict())
    return student


def merge_adapter(model: Any, path: str, field: str) -> Any:
    """`model` with the adapter at `path` (see `find_adapter`) in its weights, in evaluation mode.

    Raises:
        InputError: it cannot be read, or is not for a model with such layers.
    """
    import peft

    name = str(find_adapter(path, field) or path)
    try:
        adapted = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(name))
        report = peft.set_peft_model_state_dict(adapted, peft.load_peft_weights(name, device="cpu"))
    except Exception as error:  # nothing of ours runs in there: whatever it is, it is about these files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
        raise InputError(f"{field}: peft cannot put {path!r} on this model: {reason}; give one made for it") from error
    strange = [*report.unexpected_keys, *(key for key in report.missing_keys if "lora_" in key)]
    if strange:
        raise InputError(
            f"{field}: {path!r} was made for a model of other layers, {len(strange)} do not fit, first {strange[0]}; "
            "give one made for this model"
        )
    return adapted.merge_and_unload().eval().requires_grad_(True)
