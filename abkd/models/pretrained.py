"""Loading causal language models and tokenizers from a folder, a GGUF file, an installed package or a model hub."""

import json
import struct
from pathlib import Path

from abkd.errors import InputError
from abkd.paths import PREFIX, find_path


def find_model(path: str, field: str) -> Path | None:
    """The folder or GGUF file that `path` names, checked to be whole; None when `path` is a model hub id.

    Reads headers only and imports neither torch nor transformers, so that a wrong path is refused at once.

    Args:
        path: a folder in Hugging Face format, a `.gguf` file or a folder that holds one,
            `package:NAME` for the folder of an installed Python package, or a hub id `owner/name`.
        field: the recipe's field, named in the errors.

    Raises:
        InputError: there is no such folder or package, or its configuration or weights are missing or torn.
    """
    folder = find_path(path, field)
    if not folder.exists():
        if path.startswith((PREFIX, ".", "/", "~")) or path.count("/") > 1 or path.endswith(".gguf"):
            raise InputError(f"{field}: there is no folder {path!r}; give a model folder or a hub id owner/name")
        return None
    if folder.is_file():
        _check_gguf(folder, field)
        return folder
    if not (folder / "config.json").exists():
        gguf_files = sorted(folder.glob("*.gguf"))
        if len(gguf_files) != 1:
            found = "no config.json" if not gguf_files else f"{len(gguf_files)} .gguf files"
            raise InputError(f"{field}: {path!r} is not a model folder ({found}); give the folder that save_pretrained wrote")
        _check_gguf(gguf_files[0], field)
        return gguf_files[0]
    _check_folder(folder, field)
    return folder


def load_model(path: str, field: str, dtype: str = "float32"):
    """The causal language model at `path` (see `find_model`) in evaluation mode, weights in `dtype`."""
    import torch
    from transformers import AutoModelForCausalLM

    arguments = {"dtype": getattr(torch, dtype)}
    model = _from_pretrained(AutoModelForCausalLM, path, field, arguments)
    if getattr(model.config, "quantization_config", None) is None:
        return model.eval()
    # A model read from a GGUF file is marked as quantised and cannot be saved: move the weights to an unmarked one.
    del model.config.quantization_config
    plain = type(model)(model.config).to(arguments["dtype"])
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain.eval()


def load_tokenizer(path: str, field: str):
    """The tokenizer at `path` (see `find_model`)."""
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, path, field, {})
    if tokenizer.eos_token_id is None:
        raise InputError(f"{field}: the tokenizer of {path!r} has no end-of-text token; set one and save it again")
    return tokenizer


def _from_pretrained(auto_class, path: str, field: str, arguments: dict):
    found = find_model(path, field)
    if found is None:
        name = path
    elif found.is_file():
        name, arguments = str(found.parent), arguments | {"gguf_file": found.name}
    else:
        name, arguments = str(found), arguments | {"local_files_only": True}
    try:
        return auto_class.from_pretrained(name, **arguments)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{field}: {path!r} cannot be loaded: {reason}") from error


def _check_folder(folder: Path, field: str) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{field}: {folder / 'config.json'} is not valid JSON; copy the folder again") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{field}: {folder / 'config.json'} names no model_type; give a causal language model's folder")
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not weights:
        raise InputError(f"{field}: {str(folder)!r} holds no weights (*.safetensors); copy the folder again")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(named - {file.name for file in weights})
        if missing:
            raise InputError(f"{field}: {str(folder)!r} misses {missing[0]} ({len(missing)} of {len(named)} weight files)")
    for file in weights:
        if file.suffix == ".safetensors":
            _check_safetensors(file, field)


def _check_safetensors(file: Path, field: str) -> None:
    """The header says how long the file is: 8 bytes of length, that many of JSON, then the tensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length < size else {}
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (struct.error, ValueError, KeyError, TypeError):
            raise InputError(f"{field}: {file} is torn or not a safetensors file; copy it again") from None
    if size != 8 + length + end:
        raise InputError(f"{field}: {file} is torn: {size:,} bytes of {8 + length + end:,}; copy it again")


def _check_gguf(file: Path, field: str) -> None:
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(f"{field}: {file} is not a GGUF file; copy it again")
