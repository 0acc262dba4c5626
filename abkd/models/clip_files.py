"""Learned prompts and students of CLIP on disk, and the checkpoints of prompts that PromptSRC and PromptKD publish."""

import hashlib
import json
import os
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel

from abkd.errors import InputError
from abkd.models.clip_prompts import check_prompts
from abkd.models.pretrained import check_safetensors
from abkd.paths import find_path

PROMPTS = "clip_prompts"
VISION_KEY, TEXT_KEY = "image_encoder.VPT", "prompt_learner.ctx"
LAYER_KEY = "{}_encoder.transformer.resblocks.{}.VPT_shallow"
SAME_WEIGHTS = {
    "image_encoder.class_embedding": "vision_model.embeddings.class_embedding",
    "image_encoder.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "text_encoder.positional_embedding": "text_model.embeddings.position_embedding.weight",
}
"""Name in a published checkpoint, which may hold the whole CLIP beside its prompts -> name in transformers' CLIP."""
ROUNDING = 0.01
"""Relative distance by which they may differ: PromptSRC averages its weights over epochs in half precision."""


@dataclass(frozen=True)
class Prompts:
    """What is learned for both towers, `[depth, tokens, width]` each (see `abkd.models.clip_prompts`)."""

    vision: Tensor
    text: Tensor


def save_prompts(prompts: Prompts, folder: Path, clip: CLIPModel) -> None:
    """Writes `clip_prompts.safetensors` and `.json` into `folder`; `clip` is the one they were learned for."""
    write(folder, PROMPTS, {"vision": prompts.vision, "text": prompts.text}, {"clip": fingerprint(*_parts(clip))})


def load_prompts(path: str, clip: CLIPModel, field: str = "teacher.prompts") -> Prompts:
    """The prompts at `path`: a folder that `save_prompts` wrote, or a checkpoint that PromptSRC or PromptKD publish.

    Of a checkpoint (`VLPromptLearner/model-best.pth.tar`) the prompts alone are used, in fp32, with `clip` as it is;
    the CLIP that it may hold as well is only compared with `clip`.

    Args:
        field: the recipe's field, named in the errors.

    Raises:
        InputError: it is missing, torn, holds no prompts of both towers, or was made for another CLIP.
    """
    found, origin = find_path(path, field), f"{field}: {path!r}"
    if found.is_dir():
        tensors, record = read(found, PROMPTS, field)
        check_fingerprint(record, *_parts(clip), origin=origin)
        if tensors.keys() != {"vision", "text"}:
            raise InputError(f"{origin} holds {', '.join(tensors) or 'nothing'}, not vision and text; copy it again")
        return Prompts(tensors["vision"], tensors["text"])
    state = _published_state(found, field)
    prompts = Prompts(_stacked(state, VISION_KEY, "image", origin), _stacked(state, TEXT_KEY, "text", origin))
    _check_same_clip(state, clip, origin)
    try:
        check_prompts(prompts.vision, clip.vision_model, clip.visual_projection)
        check_prompts(prompts.text, clip.text_model, clip.text_projection)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    return prompts


def write(folder: Path, stem: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """`folder/stem.safetensors` and, after it, `folder/stem.json`; each is whole or absent."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{stem}.part"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)
    os.replace(part, folder / f"{stem}.safetensors")
    part.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, folder / f"{stem}.json")


def read(folder: Path, stem: str, field: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` wrote, on the CPU. Raises InputError where it is missing or torn."""
    for file in (folder / f"{stem}.safetensors", folder / f"{stem}.json"):
        if not file.is_file():
            raise InputError(f"{field}: {str(folder)!r} holds no {file.name}; give a folder that abkd saved")
    check_safetensors(folder / f"{stem}.safetensors", field)
    try:
        record = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise InputError(f"{field}: {folder / f'{stem}.json'} is not the JSON that abkd wrote; copy the folder again")
    return load_file(folder / f"{stem}.safetensors"), record


def fingerprint(*modules: nn.Module) -> str:
    """SHA-256 of all weights in fp32, by name: equal for equal models, wherever they were loaded from."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def check_fingerprint(record: dict[str, Any], *modules: nn.Module, origin: str) -> None:
    """Raises InputError where `record["clip"]` is not the modules' fingerprint."""
    if record.get("clip") != fingerprint(*modules):
        raise InputError(f"{origin} was made for another CLIP, or one in another precision; give that one, in float32")


def _parts(clip: CLIPModel) -> list[nn.Module]:
    return [clip.vision_model, clip.visual_projection, clip.text_model, clip.text_projection]


def _published_state(file: Path, field: str) -> dict[str, Tensor]:
    if not file.is_file():
        raise InputError(
            f"{field}: there is no {str(file)!r}; give the folder of saved prompts or a published .pth.tar file"
        )
    try:
        stand_ins: list[Any] = [
            (_no_default if name == "collections.defaultdict" else _Inert, name)
            for name in torch.serialization.get_unsafe_globals_in_checkpoint(file)
        ]
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, OSError) as error:
        reason = (str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{field}: {file} cannot be read as weights ({reason}); copy it again") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise InputError(f"{field}: {file} holds no 'state_dict'; give a checkpoint of PromptSRC or PromptKD")
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


class _Inert:
    """Stands for an object of any class that lies in a checkpoint beside the weights; nothing of its class is run.

    Dassl, the engine of both, pickles its schedule of learning rates, and with it the optimizer.
    """

    def __init__(self, *arguments: Any):
        pass


def _no_default(*arguments: Any) -> dict[Any, Any]:
    return {}


def _stacked(state: dict[str, Tensor], first: str, tower: str, origin: str) -> Tensor:
    """`[depth, tokens, width]` of the key `first`, layer 0, and the tower's keys of layers 1 to depth - 1."""
    numbered = re.compile(re.escape(LAYER_KEY).replace(r"\{\}", tower, 1).replace(r"\{\}", r"(\d+)"))
    inner = sorted(int(match[1]) for match in map(numbered.fullmatch, state) if match)
    keys = [first, *(LAYER_KEY.format(tower, layer) for layer in range(1, max(inner, default=0) + 1))]
    missing = [key for key in keys if key not in state]
    if missing:
        raise InputError(
            f"{origin} holds no {missing[0]} ({len(missing)} of {len(keys)} prompts of the {tower} encoder are "
            "missing); give a teacher that PromptSRC trained, with prompts in both encoders"
        )
    shapes = {key: list(state[key].shape) for key in keys}
    for key, shape in shapes.items():
        if len(shape) != 2 or shape != shapes[first]:
            raise InputError(
                f"{origin} has {key} of shape {shape} and {first} of {shapes[first]}; all prompts of a tower are "
                "[tokens, width]"
            )
    return torch.stack([state[key].float() for key in keys])


def _check_same_clip(state: dict[str, Tensor], clip: CLIPModel, origin: str) -> None:
    weights = clip.state_dict()
    for key, name in SAME_WEIGHTS.items():
        if key not in state:
            continue
        theirs, ours = state[key].float(), weights[name].float().cpu()
        if theirs.shape != ours.shape:
            raise InputError(
                f"{origin} was made for another CLIP: {key} has the shape {list(theirs.shape)}, in this one "
                f"{list(ours.shape)}; give the CLIP that it was trained on"
            )
        distance = float((theirs - ours).norm() / ours.norm())
        if not distance <= ROUNDING:
            raise InputError(
                f"{origin} was made for another CLIP: {key} differs by {distance:.0%}; give the one it was trained on"
            )
