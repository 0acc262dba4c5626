"""A shard: rows of some examples in one safetensors file that is whole or absent, with a checksum of its content."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from abkd.errors import InputError
from abkd.teachers.cache.manifest import shard_file

KEYS, STARTS = "keys", ".starts"
_SAID = "shard"


def claim_file(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.claim"


def write_shard(
    folder: Path, number: int, cache_digest: str, keys: Sequence[int], examples: Sequence[Mapping[str, Tensor]]
) -> None:
    """Writes what an encoding made of each example, under the example's key.

    Raises:
        InputError: the disk does not take it.
    """
    tensors = {KEYS: torch.tensor(keys, dtype=torch.int64)}
    for name in examples[0]:
        parts = [example[name] for example in examples]
        lengths = torch.tensor([0, *map(len, parts)])
        tensors[name], tensors[name + STARTS] = torch.cat(parts).contiguous(), lengths.cumsum(0)
    said = {"cache": cache_digest, "number": number, "sha256": checksum(tensors)}
    metadata = {_SAID: json.dumps(said)}  # one entry: the order of several differs from file to file
    file = shard_file(folder, number)
    part = folder / f".{file.name}.{platform.node()}-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        save_tensors(tensors, part, metadata)
        os.replace(part, file)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise InputError(
            f"--output: {file} cannot be written ({error}); free some disk, then go on with the same command"
        ) from error


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """`save_file`, which keeps the file to its owner, readable for whom the umask lets read."""
    save_file(tensors, file, metadata)
    os.umask(mask := os.umask(0))
    file.chmod(0o666 & ~mask)


def drop_parts(folder: Path, number: int) -> None:
    """Removes what processes that were killed left of a shard."""
    for part in folder.glob(f".{shard_file(folder, number).name}.*"):
        part.unlink(missing_ok=True)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.view(torch.uint8).flatten().numpy().data)
    return digest.hexdigest()


def _said(opened: Any) -> dict[str, Any]:
    """What the header says of the shard; nothing where it was altered."""
    try:
        said = json.loads((opened.metadata() or {}).get(_SAID, ""))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _check_place(said: dict[str, Any], file: Path, number: int, cache_digest: str, field: str) -> None:
    if said.get("cache") != cache_digest or said.get("number") != number:
        raise InputError(f"{field}: {file} is a shard of another cache, or another shard of this one; {again(file)}")


def read_keys(folder: Path, number: int, cache_digest: str, field: str) -> np.ndarray:
    """int64: of a shard's examples; its header alone is checked."""
    file = shard_file(folder, number)
    try:
        with safe_open(file, framework="np") as opened:
            said, keys = _said(opened), opened.get_tensor(KEYS)
    except (OSError, SafetensorError) as error:
        raise unreadable(file, error, field) from None
    _check_place(said, file, number, cache_digest, field)
    return keys


def unreadable(file: Path, error: BaseException, field: str) -> InputError:
    """What to tell of a file that is no whole safetensors file, or not for this user."""
    if "ermission denied" in str(error):
        return InputError(f"{field}: {file} may not be read ({error}); ask who wrote it for the right to read it")
    return InputError(f"{field}: {file} is torn ({error}); {again(file)}")


def again(file: Path) -> str:
    """The way out, for a message about a file that is not what it was."""
    return f"remove it, and write it again with the command that made the cache ({file.parent})"


@dataclass(frozen=True, eq=False)
class Shard:
    """A shard that is read where it is needed: its tensors are the mapped file."""

    keys: Tensor
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path, number: int, cache_digest: str, field: str) -> "Shard":
        """Raises InputError: the file is torn, altered, or of another cache; it is named."""
        file = shard_file(folder, number)
        try:
            with safe_open(file, framework="pt") as opened:
                said = _said(opened)
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise InputError(f"{field}: {file} is missing; write it with the command that made the cache") from None
        except (OSError, SafetensorError) as error:
            raise unreadable(file, error, field) from None
        _check_place(said, file, number, cache_digest, field)
        if checksum(tensors) != said.get("sha256"):
            raise InputError(f"{field}: {file} was altered, its content is not what its checksum says; {again(file)}")
        return cls(tensors.pop(KEYS), tensors)

    def example(self, index: int) -> dict[str, Tensor]:
        """What the encoding made of the example at `index`."""
        found = {}
        for name, tensor in self.tensors.items():
            if not name.endswith(STARTS):
                start, stop = self.tensors[name + STARTS][index : index + 2].tolist()
                found[name] = tensor[start:stop]
        return found
