"""A teacher that wrote its targets down: `abkd.teachers.cache`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from abkd.divergences.top_k import Tail
from abkd.errors import InputError
from abkd.head import LMHead
from abkd.targets import DenseTargets, HiddenTargets, Targets, TopKTargets
from abkd.teachers.cache.encoding import DenseEncoding, KeptEncoding
from abkd.teachers.cache.manifest import Manifest, digest_of, example_key, first_difference
from abkd.teachers.cache.shards import again, checksum, save_tensors, unreadable
from abkd.teachers.cache.store import Store
from abkd.teachers.teacher import Teacher

HEAD = "head.safetensors"


class CachedTeacher(Teacher):
    """Gives what a cache holds of each example, on the device of the batch.

    Args:
        store: the cache.
        tail: of top-k targets; None where the cache holds a sample, hidden states or logits.
        field: what the recipe calls the folder, for messages.

    `expect` says which examples will come.
    """

    def __init__(self, store: Store, tail: Tail | None = None, *, field: str = "teacher.path"):
        self.store, self.field = store, field
        kind, self._vocab = store.manifest.targets["kind"], store.manifest.vocab
        store.manifest.check_tail(tail, field.removesuffix("path") + "tail")
        self.tail: Tail = tail or "sampled"
        self.encoding = kept_encoding(store.manifest)
        self._head = read_head(store.folder, store.manifest, field) if kind == "hidden" else None
        self._where: dict[int, int] = {}  # example id -> in the store

    @classmethod
    def open(cls, folder: str | Path, tail: Tail | None = None, *, field: str = "teacher.path") -> "CachedTeacher":
        """The teacher of the cache in `folder`. Raises InputError: there is none, it is not whole, of another task."""
        manifest = Manifest.read_whole(Path(folder), field, "language_model")
        return cls(Store(Path(folder), manifest, field), tail, field=field)

    def expect(self, examples: Iterable[Any], data: Mapping[str, Any]) -> None:
        """Finds every example that will be asked for.

        Args:
            examples: with `example_id`, `prompt_ids` and `completion_ids`.
            data: what they were made of, as the manifest has it.

        Raises:
            InputError: the cache lacks some; says what was made otherwise.
        """
        examples = list(examples)
        found = self.store.find([example_key(each.prompt_ids, each.completion_ids) for each in examples])
        if num_missing := int((found < 0).sum()):
            self.store.check()  # their keys may have been altered
            made = {name: value for name, value in self.store.manifest.data.items() if name in data}
            folder = str(self.store.folder)
            field, here, there = first_difference(dict(data), made)
            why = f"it was made with {field}={there!r}, and here is {field}={here!r}"
            if here == there:
                why = "they are other texts than those it was made of, under the same names"
            raise InputError(
                f"{self.field}: the cache in {folder!r} lacks {num_missing:,} of {len(examples):,} examples: {why}; "
                "use the cache's, or write another cache"
            )
        self._where.update(zip((each.example_id for each in examples), found.tolist(), strict=True))

    @property
    def vocab(self) -> int:
        return self._vocab

    @property
    def num_classes(self) -> int | None:
        return self.store.manifest.targets["k"] if self.store.manifest.is_reduced else None

    @property
    def approximation(self) -> str:
        manifest = self.store.manifest
        return f"{manifest.described}, tail={self.tail}" if manifest.is_reduced else ""

    def narrow(self, vocab: int) -> None:
        self._vocab = vocab
        if self._head is not None:
            bias = None if self._head.bias is None else self._head.bias[:vocab]
            self._head = replace(self._head, weight=self._head.weight[:vocab], bias=bias)

    @torch.no_grad()
    def targets(self, *, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, example_ids: Tensor) -> Targets:
        device = input_ids.device
        parts = [self.store.example(self._place_of(example)) for example in example_ids.tolist()]
        counted = self._of_completions(parts, attention_mask, mask)
        if self.encoding is None:
            rows = torch.cat([part["rows"] for part in parts])[counted].to(device)
            if self._head is None:
                return DenseTargets(rows[:, : self._vocab])
            self._head = self._head.to(device)
            return HiddenTargets(rows, self._head)
        temperature = self.store.manifest.targets["temperature"]
        kept = TopKTargets.cat([self.encoding.decode(part, self.tail, temperature) for part in parts])
        return kept.at(counted).narrowed(self._vocab).to(device)

    def _place_of(self, example_id: int) -> int:
        if example_id not in self._where:
            raise InputError(f"{self.field}: example {example_id} was not among those that expect() was given; add it")
        return self._where[example_id]

    def _of_completions(self, parts: Sequence[Mapping[str, Tensor]], attention_mask: Tensor, mask: Tensor) -> Tensor:
        """bool, of the rows of all parts, end to end: which of them `mask` counts.

        Raises:
            InputError: it counts a token that is in no completion.
        """
        mask, lengths = mask.cpu(), attention_mask.sum(1).tolist()
        name = (self.encoding or DenseEncoding).per_token
        numbers = [len(part[name]) for part in parts]
        wanted = [row[end - 1 - n : end - 1] for row, end, n in zip(mask, lengths, numbers, strict=True)]
        counted = torch.cat(wanted)
        if int(counted.sum()) != int(mask.sum()):
            raise InputError("the mask counts tokens outside the completions, and the cache has none for them")
        return counted


def kept_encoding(manifest: Manifest) -> KeptEncoding | None:
    """Of top-k and sampled targets."""
    targets = manifest.targets
    if not manifest.is_reduced:
        return None
    return KeptEncoding(manifest.vocab, targets["value_bits"], targets["num_draws"], targets["num_exact"])


def write_head(head: LMHead, file: Path) -> None:
    """As a safetensors file."""
    save_tensors(_tensors(head), file, {"head": json.dumps({"logit_scale": head.logit_scale, "softcap": head.softcap})})


def head_digest(head: LMHead) -> str:
    """Of all its numbers, for the manifest."""
    return digest_of([checksum(_tensors(head)), head.logit_scale, head.softcap])


def read_head(folder: Path, manifest: Manifest, field: str) -> LMHead:
    """Raises InputError: it is torn, or not the one that the manifest knows."""
    file = folder / HEAD
    try:
        tensors = load_file(file)
        with safe_open(file, framework="pt") as opened:
            said = json.loads(opened.metadata()["head"])
        head = LMHead(tensors["weight"], tensors.get("bias"), said["logit_scale"], said["softcap"])
    except (OSError, SafetensorError, LookupError, ValueError, AttributeError, TypeError, InputError) as error:
        raise unreadable(file, error, field) from None
    if head_digest(head) != manifest.targets["head"]:
        raise InputError(f"{field}: {file} was altered, or is of another cache; {again(file)}")
    return head


def _tensors(head: LMHead) -> dict[str, Tensor]:
    tensors = {"weight": head.weight.detach().cpu().contiguous()}
    return tensors if head.bias is None else tensors | {"bias": head.bias.detach().cpu().contiguous()}
