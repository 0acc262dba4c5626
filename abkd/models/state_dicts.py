"""State dicts from files, put into networks whole or refused in one line."""

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from abkd.errors import InputError
from abkd.models.classifier_spec import check_classes

NESTINGS = ("state_dict", "model_state_dict", "model", "net")
"""Where training scripts put a state dict inside of a file, beside the epoch and the optimiser."""
PREFIXES = ("module.", "_orig_mod.", "network.")
"""What DataParallel, torch.compile and `ImageClassifier` put before every key."""


def read_state(file: Path, field: str) -> dict[str, Tensor]:
    """The tensors in a `.safetensors` file, or in one of `torch.save`: bare or nested, without wrappers' prefixes.

    Raises:
        InputError: it is torn, holds objects other than tensors and plain values, or no state dict.
    """
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return _unwrapped(load_file(file), file, field)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{field}: {file} holds objects, and reading them would run their code; where you trust it, save its "
            "weights alone: torch.save(model.state_dict(), ...)"
        ) from None
    except Exception as error:  # nothing of ours runs in there: whatever it is, it is about this file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
        raise InputError(f"{field}: {file} cannot be read ({reason}); copy it again") from None
    return _unwrapped(content, file, field)


def _unwrapped(content: Any, file: Path, field: str) -> dict[str, Tensor]:
    inner = content
    while isinstance(inner, Mapping):
        if inner and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in inner.items()):
            return _unprefixed(dict(inner))
        inner = next((inner[key] for key in NESTINGS if key in inner), None)
    found = ", ".join(str(key) for key in list(content)[:5]) if isinstance(content, Mapping) else type(content).__name__
    raise InputError(f"{field}: {file} holds no state dict (but {found or 'nothing'}); save model.state_dict()")


def _unprefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            return _unprefixed({key.removeprefix(prefix): tensor for key, tensor in state.items()})
    return state


def load_weights(
    network: nn.Module,
    file: Path,
    name: str,
    section: str,
    *,
    new_head: bool = False,
    others: Iterable[tuple[str, nn.Module]] = (),
) -> None:
    """Puts every weight of the file into `network`.

    Args:
        name: of the network, for messages that begin with the recipe's section.
        new_head: a head of another number of classes is left out, and the network keeps its own.
        others: networks by name, to find the one that such weights are for; made only where they do not fit.

    Raises:
        InputError: the file cannot be read (`read_state`), or weights are missing, unexpected or of another shape.
    """
    state = read_state(file, f"{section}.path")
    misfit = _differences(_shapes(network), state)
    if misfit and _fits_but_for_the_classes(network, state):
        head, own = _head(network), network.state_dict()
        check_classes(len(own[head[0]]), len(state[head[0]]), str(file), section, new_head=new_head)
        state |= {key: own[key] for key in head}
    elif misfit:
        near = next((other for other, candidate in others if _fits_but_for_the_classes(candidate, state)), None)
        way_out = f"did you mean {section}.name={near}?" if near else "give the name of the network that it is of"
        raise InputError(f"{section}.path: {file} does not fit {name}: {misfit}; {way_out}")
    network.load_state_dict(state)


def _fits_but_for_the_classes(network: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Does the state dict fit, whatever number of classes it has?"""
    head = _head(network)
    if not head or head[0] not in state:
        return False
    num_classes = state[head[0]].shape[:1]
    shapes = _shapes(network)
    return not _differences(shapes | {key: num_classes + shapes[key][1:] for key in head}, state)


def _head(network: nn.Module) -> list[str]:
    """Keys of the last linear layer's weight, `[num_classes, channels]`, and bias; none without such a layer."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return [key for name in linear[-1:] for key in (f"{name}.weight", f"{name}.bias") if key in network.state_dict()]


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in network.state_dict().items()}


def _differences(wanted: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> str:
    """How many weights do not fit and which comes first, in words; empty where all do."""
    found = {
        # counters of batches, which older versions of torch did not save and evaluation does not use
        "missing": [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in state if key not in wanted],
        "of another shape": [
            f"{key} {list(state[key].shape)} for {list(shape)}"
            for key, shape in wanted.items()
            if key in state and state[key].shape != shape
        ],
    }
    return ", ".join(f"{len(keys)} {what} (first {keys[0]})" for what, keys in found.items() if keys)
