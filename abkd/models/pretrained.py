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
        InputError: there is no such folder or package, or its configuration or weights are missing or torn
            (a torn GGUF file is found when it is loaded).
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
            raise InputError(
                f"{field}: {path!r} is not a model folder ({found}); give the folder that save_pretrained wrote"
            )
        _check_gguf(gguf_files[0], field)
        return gguf_files[0]
    _check_folder(folder, field)
    return folder


def load_model(path: str, field: str, dtype: str = "float32", quantization: str = "none"):
    """The causal language model at `path` (see `find_model`) in evaluation mode, weights in `dtype`.

    Args:
        quantization: int8 or nf4 for the linear layers but the head, by bitsandbytes, which puts such a model on this
            process's GPU where there is one; none leaves it on the CPU.

    Raises:
        InputError: it cannot be read, or lacks a weight that its configuration asks for.
    """
    import torch
    from transformers import AutoModelForCausalLM

    arguments = {"dtype": getattr(torch, dtype), "output_loading_info": True, "ignore_mismatched_sizes": True}
    if quantization != "none":
        arguments |= _quantized(quantization, dtype)
    model, report = _from_pretrained(AutoModelForCausalLM, path, field, arguments)
    random = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if random:
        raise InputError(
            f"{field}: {path!r} lacks {len(random):,} of the weights that its configuration asks for, or has them in "
            f"another size, first {random[0]}; give a whole causal language model"
        )
    if getattr(model, "quantization_method", None) == "gguf":  # its weights are plain; so marked it cannot be saved
        model.hf_quantizer.remove_quantization_config(model)
    return model.eval()


def _quantized(quantization: str, dtype: str) -> dict:
    """Arguments of `from_pretrained`."""
    import torch
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
        )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": settings, "device_map": {"": device}}


def load_skeleton(path: str, field: str, dtype: str = "float32"):
    """The model of `load_model` with weights of its shapes and arbitrary values: its configuration is read, no weight.

    For use where tensors hold no memory (`abkd.kernels.memory`).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = _from_pretrained(AutoConfig, path, field, {})
    return AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, dtype)).eval()


def load_tokenizer(path: str, field: str):
    """The tokenizer at `path` (see `find_model`)."""
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, path, field, {})
    if tokenizer.eos_token_id is None:
        raise InputError(f"{field}: the tokenizer of {path!r} has no end-of-text token; set one and save it again")
    return tokenizer


def load_tokenizer_folder(folder: Path, field: str):
    """A tokenizer that stands alone in a folder, as its `save_pretrained` wrote it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # as below
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
        raise InputError(f"{field}: the tokenizer in {str(folder)!r} cannot be loaded: {reason}") from error


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
    except Exception as error:  # nothing of ours runs in there: whatever it is, it is about these files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
        way_out = "give one that is whole, with its tokenizer" if found else "check the name and the connection"
        raise InputError(f"{field}: {auto_class.__name__} cannot load {path!r}: {reason}; {way_out}") from error


def _check_folder(folder: Path, field: str) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{field}: {folder / 'config.json'} is not valid JSON; copy the folder again") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(
            f"{field}: {folder / 'config.json'} names no model_type; give a causal language model's folder"
        )
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not weights:
        raise InputError(f"{field}: {str(folder)!r} holds no weights (*.safetensors); copy the folder again")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{field}: {index} is torn or no index of weights; copy it again") from None
        missing = sorted(named - {file.name for file in weights})
        if missing:
            raise InputError(
                f"{field}: {str(folder)!r} misses {missing[0]} ({len(missing)} of {len(named)} weight files); "
                "copy the folder again"
            )
    for file in weights:
        if file.suffix == ".safetensors":
            check_safetensors(file, field)


def check_safetensors(file: Path, field: str) -> None:
    """The header says how long the file is: 8 bytes of length, that many of JSON, then the tensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length < size else {}
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (struct.error, ValueError, LookupError, TypeError, AttributeError):
            raise InputError(f"{field}: {file} is torn or not a safetensors file; copy it again") from None
    if size != 8 + length + end:
        raise InputError(f"{field}: {file} is torn: {size:,} bytes of {8 + length + end:,}; copy it again")


def _check_gguf(file: Path, field: str) -> None:
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(f"{field}: {file} is not a GGUF file; give a model folder or a whole .gguf file")
