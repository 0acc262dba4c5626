"""What a cache is: whose targets, of which data, in which form. Imports no torch."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from abkd.errors import InputError

FORMAT = 1
MOST_CLASSES = 32_767
"""Of a token's kept ones: their number has 16 bits."""
MANIFEST, TOKENIZER = "manifest.json", "tokenizer"
CHECKSUM = "checksum"
"""Of the manifest's other entries."""
_PART = ".manifest"


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json. Two processes that write one cache must have the same."""

    task: str
    targets: dict[str, Any]
    """`kind`, top_k, sampled, hidden or logits, and what it takes: see docs/teachers.md."""
    vocab: int
    teacher: dict[str, Any]
    """`identity`, what tells it from others; `section`, as its recipe names it; `revision` of a hub's model or null."""
    tokenizer: dict[str, Any]
    """Digests of its vocabulary and of its chat template; empty for images."""
    data: dict[str, Any]
    """What the examples were made of, and a `digest` of them all, which alone must be the same."""
    shards: list[list[int]]
    """Of each: how many examples, and how many tokens."""
    version: str
    """Of abkd, that wrote it first."""
    format: int = FORMAT

    @property
    def identity(self) -> dict[str, Any]:
        """What two processes that write one cache must have the same."""
        content = asdict(self)
        content.pop("version")
        return content | {"teacher": self.teacher["identity"], "data": {"digest": self.data["digest"]}}

    @cached_property
    def digest(self) -> str:
        """That every shard names, so that no shard of another cache is taken for one of this."""
        return digest_of(self.identity)

    @property
    def num_tokens(self) -> int:
        return sum(tokens for _, tokens in self.shards)

    @property
    def num_examples(self) -> int:
        return sum(examples for examples, _ in self.shards)

    @property
    def unit(self) -> str:
        """Of what a row is."""
        return "token" if self.task == "language_model" else "image"

    @property
    def described(self) -> str:
        """The kind of targets, in a few words."""
        of = self.targets
        match of["kind"]:
            case "top_k":
                within = f", or those of mass {of['top_p']:g}" if of["top_p"] < 1 else ""
                return f"the {of['k']} likeliest classes{within}"
            case "sampled":
                return f"the {of['num_exact']} likeliest classes and {of['num_draws']} draws"
            case "hidden":
                return f"hidden states, {of['width']} x {of['dtype']}"
        return f"logits, {of['width']} x {of['dtype']}"

    @property
    def is_reduced(self) -> bool:
        """Whether the targets are at some classes of each token."""
        return self.targets["kind"] in ("top_k", "sampled")

    def check_task(self, task: str, field: str) -> None:
        if self.task != task:
            raise InputError(f"{field}: the cache is for task={self.task}, and this recipe is for task={task}")

    def check_complete(self, folder: Path, field: str) -> None:
        """Raises InputError where shards are missing."""
        if missing := self.missing_shards(folder):
            raise InputError(
                f"{field}: the cache in {str(folder)!r} is not finished, {len(missing)} of {len(self.shards)} shards "
                f"are missing, the first is {shard_file(folder, missing[0]).name}; go on with the command that began it"
            )

    def missing_shards(self, folder: Path) -> list[int]:
        return [number for number in range(len(self.shards)) if not shard_file(folder, number).exists()]

    def check_tail(self, tail: str | None, field: str) -> None:
        """Top-k targets need a tail, and no others have one to choose."""
        kind = self.targets["kind"]
        if kind == "top_k" and tail is None:
            raise InputError(
                f"{field}: missing, and the cache holds top-k targets; set {field}=lump, uniform or renormalise, see "
                "docs/teachers.md"
            )
        if kind != "top_k" and tail is not None:
            raise InputError(
                f"{field}={tail}: the cache holds {self.described}, without a tail to choose; leave it out"
            )

    @classmethod
    def read(cls, folder: Path, field: str) -> "Manifest":
        """Of the cache in `folder`.

        Raises:
            InputError: there is none, it is torn, or of another format.
        """
        file = folder / MANIFEST
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"{field}: {str(folder)!r} holds no cache ({MANIFEST} is missing); write one with: abkd cache RECIPE "
                f"--output {folder}"
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"{field}: {file} cannot be read ({error}); write the cache again") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else None
            raise InputError(
                f"{field}: {file} is of format {found!r}, and this abkd reads format {FORMAT}; write the cache again"
            )
        if missing := {*(each.name for each in fields(cls)), CHECKSUM} - content.keys():
            raise InputError(f"{field}: {file} lacks {', '.join(sorted(missing))}; write the cache again")
        if content.pop(CHECKSUM) != digest_of(content):
            raise InputError(f"{field}: {file} was altered, it is not what its checksum says; write the cache again")
        return cls(**{each.name: content[each.name] for each in fields(cls)})

    @classmethod
    def read_whole(cls, folder: Path, field: str, task: str) -> "Manifest":
        """As `read`, of a finished cache for the task. Raises InputError also where it is none."""
        manifest = cls.read(folder, field)
        manifest.check_task(task, field)
        manifest.check_complete(folder, field)
        return manifest

    def write(self, folder: Path) -> None:
        """Makes the folder's manifest, unless it has the same one.

        Raises:
            InputError: the folder holds another cache, or anything else.
        """
        check_output(folder)
        if not (folder / MANIFEST).exists():
            try:
                self._make(folder)
            except OSError as error:
                raise InputError(
                    f"--output: {str(folder)!r} cannot be written ({error}); give another folder"
                ) from None
        self.check_same(Manifest.read(folder, "--output"), folder)

    def _make(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        content = asdict(self)
        part = folder / f"{_PART}-{os.getpid()}-{os.urandom(4).hex()}"
        part.write_text(json.dumps(content | {CHECKSUM: digest_of(content)}, indent=2) + "\n", encoding="utf-8")
        try:
            os.link(part, folder / MANIFEST)  # fails where another process was first
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(part, folder / MANIFEST)
        part.unlink(missing_ok=True)

    def check_same(self, other: "Manifest", folder: Path) -> None:
        """Refuses to go on with a cache of anything else."""
        if self.identity == other.identity:
            return
        field, here, there = first_difference(self.identity, other.identity)
        if field == "data.digest":  # say what made them other examples
            field, here, there = first_difference(self.data, other.data)
        if field.startswith("shards"):
            field, here, there = "--shard-tokens", *(f"{len(each.shards)} shards" for each in (self, other))
        raise InputError(
            f"--output: the cache in {str(folder)!r} was started with {field}={there!r}, not {here!r}; go on with the "
            "same command, or give another folder"
        )


def check_output(folder: Path) -> None:
    """Refuses what is no folder, and a folder that holds anything else than a cache; it is not touched."""
    try:
        others = [each.name for each in folder.iterdir() if not each.name.startswith(_PART)]
        if (folder / MANIFEST).exists():  # looked for after the others, before which a process writes it
            Manifest.read(folder, "--output")
        elif others:
            raise InputError(f"--output: {str(folder)!r} holds {others[0]!r} and no cache; give another folder")
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"--output: {str(folder)!r} is no folder for a cache ({error}); give another") from None


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def first_difference(here: Any, there: Any, path: str = "") -> tuple[str, Any, Any]:
    """(field, value here, value there) of the first field, as `data.train`, that differs."""
    if isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        here, there = (dict(enumerate(each)) for each in (here, there))
    if isinstance(here, dict) and isinstance(there, dict):
        for key in dict.fromkeys([*here, *there]):
            if here.get(key) != there.get(key):
                return first_difference(here.get(key), there.get(key), f"{path}.{key}" if path else key)
    return path, here, there


def digest_of(content: Any) -> str:
    """16 hexadecimal digits of a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def example_key(prompt_ids: tuple[int, ...], completion_ids: tuple[int, ...]) -> int:
    """int64 of a text: by it an example is found, in whatever data set and place it stands."""
    content = json.dumps([prompt_ids, completion_ids]).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
