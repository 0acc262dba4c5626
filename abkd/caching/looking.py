"""What a cache is, and whether it is whole: `abkd cache info` and `abkd cache verify`."""

from pathlib import Path
from typing import Any

from tqdm import tqdm

from abkd.errors import InputError
from abkd.language_teachers import cached_tokenizer
from abkd.teachers.cache.claims import is_claimed
from abkd.teachers.cache.encoding import RANGE
from abkd.teachers.cache.manifest import Manifest, shard_file
from abkd.teachers.cache.shards import Shard, claim_file
from abkd.teachers.cached import read_head

FIELD = "cache"


def describe_cache(folder: Path) -> list[str]:
    """Lines for the user."""
    manifest = Manifest.read(folder, FIELD)
    missing = manifest.missing_shards(folder)
    there = [number for number in range(len(manifest.shards)) if number not in missing]
    size = sum(shard_file(folder, number).stat().st_size for number in there)
    tokens = sum(manifest.shards[number][1] for number in there)
    section = manifest.teacher["section"]
    busy = [number for number in missing if is_claimed(claim_file(folder, number))]
    lines = [
        f"targets: {manifest.described}",
        f"of: {manifest.num_examples:,} examples, {manifest.num_tokens:,} {manifest.unit}s, {manifest.vocab:,} classes",
        f"teacher: {_said(section)}",
        f"data: {_said({name: value for name, value in manifest.data.items() if name != 'digest'})}",
        f"shards: {len(there):,} of {len(manifest.shards):,}, {size / 2**20:,.1f} MiB, "
        f"{size / max(tokens, 1):,.1f} bytes per {manifest.unit}",
        f"written by abkd {manifest.version}, format {manifest.format}",
    ]
    if manifest.is_reduced:
        bits = manifest.targets["value_bits"]
        error = f"precision: {bits} bits, ln p within {RANGE / (2**bits - 1):.2g} nats"
        lines.insert(1, f"{error}; temperature {manifest.targets['temperature']:g}")
    if missing:
        lines.append(f"not finished: {len(missing):,} shards are missing, {len(busy):,} of them are being written")
    return lines


def _said(section: dict[str, Any]) -> str:
    given = {name: value for name, value in section.items() if value not in ("", None, False, 0, (), [])}
    return ", ".join(f"{name}={value}" for name, value in given.items())


def verify_cache(folder: Path) -> list[str]:
    """Problems, a line each; empty where tokenizer, head and every shard are there and what their checksums say."""
    manifest = Manifest.read(folder, FIELD)
    problems = []
    for is_there, read in (
        (manifest.tokenizer, lambda: cached_tokenizer(folder, FIELD)),
        (manifest.targets["kind"] == "hidden", lambda: read_head(folder, manifest, FIELD)),
    ):
        try:
            if is_there:
                read()
        except InputError as error:
            problems.append(str(error))
    for number in tqdm(range(len(manifest.shards)), desc="verifying", unit="shard", leave=False):
        try:
            shard = Shard.read(folder, number, manifest.digest, FIELD)
        except InputError as error:
            problems.append(str(error))
            continue
        if len(shard.keys) != manifest.shards[number][0]:
            problems.append(
                f"{shard_file(folder, number)} holds {len(shard.keys)} examples, not {manifest.shards[number][0]}"
            )
    return problems
