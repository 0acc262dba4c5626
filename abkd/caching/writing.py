"""The shards of a cache, one after the other, beside other processes that write the same cache."""

import abc
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from abkd.errors import InputError
from abkd.setup import Say
from abkd.teachers.cache.claims import claim, is_claimed, keep
from abkd.teachers.cache.manifest import Manifest, shard_file
from abkd.teachers.cache.shards import claim_file, drop_parts, write_shard

Shard = tuple[Sequence[int], Sequence[Mapping[str, Tensor]]]
"""Keys, and what an encoding made of each example."""


class CacheWriter(abc.ABC):
    """What a task makes the shards of."""

    manifest: Manifest

    @property
    def head_bytes(self) -> int:
        """Of the output head, if it is kept."""
        return 0

    @property
    @abc.abstractmethod
    def num_bytes(self) -> int:
        """Of all shards, at most."""

    def write_beside(self, folder: Path) -> None:  # noqa: B027
        """What else the folder holds, tokenizer or head: the same, whoever writes it. Nothing, if a task has none."""

    @abc.abstractmethod
    def make_shard(self, number: int, progress: Callable[[int], Any]) -> Shard:
        """Calls `progress` with a count of tokens now and then."""


def write_cache(folder: Path, writer: CacheWriter, say: Say) -> None:
    """Writes every shard that is not there and that no other live process is writing.

    What it takes is said, and compared with the free disk, before the work starts.

    Raises:
        InputError: the folder holds another cache; the disk has no room.
    """
    manifest = writer.manifest
    each = writer.num_bytes / max(manifest.num_tokens, 1)
    head = f", and {writer.head_bytes / 2**20:,.1f} MiB for the output head" if writer.head_bytes else ""
    say(
        f"cache: {manifest.described}; {manifest.num_examples:,} examples, {manifest.num_tokens:,} {manifest.unit}s, "
        f"at most {each:,.0f} bytes each, {writer.num_bytes / 2**20:,.1f} MiB in {len(manifest.shards):,} shards{head}"
    )
    _check_disk(folder, writer.num_bytes + writer.head_bytes)
    manifest.write(folder)
    writer.write_beside(folder)
    missing = manifest.missing_shards(folder)
    if not missing:
        say(f"{folder} is finished already")
        return
    if len(missing) < len(manifest.shards):
        say(f"going on: {len(manifest.shards) - len(missing):,} of {len(manifest.shards):,} shards are there")
    total = sum(manifest.shards[number][1] for number in missing)
    bar: Any
    with tqdm(total=total, unit=manifest.unit, desc=folder.name, unit_scale=True) as bar:
        while free := _free(folder, manifest):  # again, for what others began and did not finish
            for number in free:
                with _claimed(folder, number) as mine:
                    if mine:
                        made = writer.make_shard(number, _progress(folder, number, bar))
                        write_shard(folder, number, manifest.digest, *made)
    if left := manifest.missing_shards(folder):
        say(f"the other {len(left):,} shards are being written by other processes")
        return
    size = sum(shard_file(folder, number).stat().st_size for number in range(len(manifest.shards)))
    each = size / max(manifest.num_tokens, 1)
    say(f"{folder} is finished: {size / 2**20:,.1f} MiB, {each:,.1f} bytes per {manifest.unit}")


def _free(folder: Path, manifest: Manifest) -> list[int]:
    """The shards that are not there, and that no other live process is writing."""
    return [n for n in manifest.missing_shards(folder) if not is_claimed(claim_file(folder, n))]


@contextmanager
def _claimed(folder: Path, number: int):
    """Whether the shard is this process's to write, which it is till the end of the block."""
    file = claim_file(folder, number)
    with _refusing(file):
        mine = not shard_file(folder, number).exists() and claim(file)
    try:
        if mine:
            drop_parts(folder, number)
        yield mine and not shard_file(folder, number).exists()  # another may have finished it before the claim
    finally:
        if mine:
            file.unlink(missing_ok=True)


@contextmanager
def _refusing(file: Path):
    """Raises InputError where the disk does not take a file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"--output: {file} cannot be written ({error}); then go on with the same command") from error


def _progress(folder: Path, number: int, bar: Any) -> Callable[[int], None]:
    """Moves the bar and keeps the claim fresh."""
    file = claim_file(folder, number)

    def progress(num_tokens: int) -> None:
        bar.update(num_tokens)
        keep(file)

    return progress


def _check_disk(folder: Path, num_bytes: int) -> None:
    existing = next(each for each in [folder, *folder.absolute().parents] if each.exists())
    there = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = shutil.disk_usage(existing).free + there
    if free < num_bytes:
        raise InputError(
            f"--output: {str(folder)!r} needs {num_bytes / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; free some, "
            "give another folder, or keep less of each token"
        )


def put_beside(folder: Path, name: str, write: Callable[[Path], Any]) -> None:
    """Writes a file or folder aside and renames it, unless it is there."""
    target = folder / name
    if target.exists():
        return
    part = folder / f".{name}.{os.getpid()}-{os.urandom(4).hex()}"
    with _refusing(target):
        write(part)
    try:
        os.replace(part, target)
    except OSError:  # a folder that another process was first to write
        shutil.rmtree(part, ignore_errors=True)
