"""The cache of a language model's teacher."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abkd import config
from abkd.caching.options import SHARD_ROWS, CacheOptions
from abkd.caching.writing import CacheWriter, Shard, put_beside, write_cache
from abkd.data.batches import Collator, num_tokens
from abkd.data.instructions import Example
from abkd.errors import InputError, ServerLost
from abkd.fit import device_of
from abkd.head import LMHead
from abkd.inputs import Inputs, teacher_temperature
from abkd.language_teachers import movable_models, texts_of, tokenizer_digests
from abkd.objective import completion_mask
from abkd.setup import Say, Setup, prepare
from abkd.targets import HiddenTargets, Targets, TopKTargets
from abkd.teachers.cache.encoding import DenseEncoding, KeptEncoding
from abkd.teachers.cache.identity import config_digest, weights_digest
from abkd.teachers.cache.manifest import MOST_CLASSES, TOKENIZER, Manifest, digest_of, example_key
from abkd.teachers.cached import HEAD, head_digest, write_head
from abkd.teachers.in_process import InProcessTeacher
from abkd.teachers.teacher import Teacher

SHARD_BYTES = 2**30
DEFAULT_K, VALUE_BITS, BATCH_SIZE = 50, 12, 8


def cache_texts(recipe: config.LanguageRecipe, inputs: Inputs, options: CacheOptions, folder: Path, say: Say) -> None:
    """Targets for the completions of the training and the validation data, under the examples' content.

    Args:
        recipe, inputs, options: as `abkd.caching.check.check` passed them.

    Raises:
        InputError: the teacher cannot give such targets.
    """
    setup = prepare(recipe, inputs._replace(sets={}), say)
    assert setup.teacher is not None
    for model in movable_models(recipe, setup.teacher):
        model.to(device_of(recipe))
    for part in setup.teacher.parts:
        if isinstance(part, InProcessTeacher):
            part.remember = False  # every example comes by once
    examples = {example_key(each.prompt_ids, each.completion_ids): each for each in [*setup.train, *setup.validation]}
    writer = _Writer(recipe, setup, options, examples)
    try:
        write_cache(folder, writer, say)
    except ServerLost as error:
        raise ServerLost(f"{error}, then go on with the same command; whole shards are kept") from error


class _Writer(CacheWriter):
    """Shards of consecutive examples."""

    def __init__(
        self, recipe: config.LanguageRecipe, setup: Setup, options: CacheOptions, examples: dict[int, Example]
    ):
        assert setup.teacher is not None
        self.setup, self.options, self.teacher = setup, options, setup.teacher
        self.device = device_of(recipe)
        first = self._targets([next(iter(examples.values()))])
        self.targets, self.encoding = _described(first, self.teacher.num_classes, recipe, options)
        self.parts = _partition(list(examples.items()), options.shard_tokens or _shard_tokens(self.encoding))
        self.head: LMHead | None = None
        if options.kind == "hidden" and isinstance(first, HiddenTargets):
            self.head = first.head
            self.targets["head"] = head_digest(first.head)
        self.manifest = Manifest(
            task=recipe.task,
            targets=self.targets,
            vocab=first.shape[1],
            teacher=_identified(recipe, self.teacher),
            tokenizer=tokenizer_digests(setup.tokenizer),
            data=texts_of(recipe) | {"digest": digest_of(list(examples))},
            shards=[[len(part), sum(len(each.completion_ids) for _, each in part)] for part in self.parts],
            version=version("abkd"),
        )

    @property
    def num_bytes(self) -> int:
        """Of the shards, at most."""
        tokens = self.manifest.num_tokens
        beside = 64 * self.manifest.num_examples + 2048 * len(self.parts)  # keys and starts; headers
        if isinstance(self.encoding, DenseEncoding):
            return self.encoding.most_bytes(tokens) + beside
        return self.encoding.most_bytes(tokens, self.targets["k"]) + beside

    @property
    def head_bytes(self) -> int:
        """Of the output head, if it is kept."""
        return 0 if self.head is None else 2048 + sum(tensor.nbytes for tensor in self.head.tensors)

    def write_beside(self, folder: Path) -> None:
        put_beside(folder, TOKENIZER, self.setup.tokenizer.save_pretrained)
        if (head := self.head) is not None:
            put_beside(folder, HEAD, lambda part: write_head(head, part))

    def make_shard(self, number: int, progress: Callable[[int], Any]) -> Shard:
        """Examples of like length are read together."""
        part = sorted(self.parts[number], key=lambda item: num_tokens(item[1]))
        keys, encoded = [key for key, _ in part], []
        size = self.options.batch_size or BATCH_SIZE
        for start in range(0, len(part), size):
            batch = part[start : start + size]
            targets = self._targets([example for _, example in batch])
            first = 0
            for key, example in batch:
                stop = first + len(example.completion_ids)
                encoded.append(self._encode(key, targets, first, stop))
                first = stop
            progress(first)
        return keys, encoded

    @torch.no_grad()
    def _targets(self, examples: Sequence[Example]) -> Targets:
        batch = {name: tensor.to(self.device) for name, tensor in Collator.of(self.setup.tokenizer)(examples).items()}
        mask = completion_mask(batch.pop("labels"))
        return self.teacher.targets(**batch, mask=mask)

    @torch.no_grad()
    def _encode(self, key: int, targets: Targets, start: int, stop: int) -> dict[str, Tensor]:
        """Of one example; a sample's draws are its own, whoever writes it."""
        if isinstance(self.encoding, DenseEncoding):
            return self.encoding.encode(_dense_rows(targets, self.targets["kind"], start, stop))
        temperature, k = self.targets["temperature"], self.targets["k"]
        if isinstance(targets, TopKTargets):
            return self.encoding.encode(targets.at(slice(start, stop)).first(k).within(self.options.top_p))
        logits = targets.logits(start, stop)
        if self.targets["kind"] == "top_k":
            kept = TopKTargets.of_logits(logits, k, tail="lump", temperature=temperature)
            return self.encoding.encode(kept.within(self.options.top_p))
        generator = torch.Generator(logits.device).manual_seed((key ^ self.targets["seed"]) % 2**63)
        drawn = {"num_draws": self.targets["num_draws"], "num_exact": self.targets["num_exact"]}
        sample = TopKTargets.sample(logits, **drawn, temperature=temperature, generator=generator)
        return self.encoding.encode(sample)


def _partition(items: list[tuple[int, Example]], shard_tokens: int) -> list[list[tuple[int, Example]]]:
    """Consecutive examples, closed as soon as they hold so many tokens."""
    parts: list[list[tuple[int, Example]]] = [[]]
    tokens = 0
    for item in items:
        if tokens >= shard_tokens:
            parts.append([])
            tokens = 0
        parts[-1].append(item)
        tokens += len(item[1].completion_ids)
    return parts


def _shard_tokens(encoding: KeptEncoding | DenseEncoding) -> int:
    """As many as `SHARD_ROWS`, or of wide rows fewer: a shard is held in memory until it is written."""
    if isinstance(encoding, KeptEncoding):
        return SHARD_ROWS
    return max(1, min(SHARD_ROWS, SHARD_BYTES // encoding.most_bytes(1)))


def _described(
    first: Targets, given_k: int | None, recipe: config.LanguageRecipe, options: CacheOptions
) -> tuple[dict[str, Any], KeptEncoding | DenseEncoding]:
    """The manifest's `targets`, and the encoding that goes with them."""
    kind = options.kind
    if kind in ("hidden", "logits"):
        rows = _dense_rows(first, kind, 0, 1)
        dtype = getattr(torch, options.dtype) if options.dtype else rows.dtype
        described = {"kind": kind, "width": rows.shape[1], "dtype": str(dtype).removeprefix("torch.")}
        return described, DenseEncoding(rows.shape[1], dtype)
    vocab, temperature = first.shape[1], options.temperature or float(teacher_temperature(recipe)[1])
    if isinstance(first, TopKTargets):
        assert given_k is not None
        first.check_temperature(temperature)
        if first.tail == "sampled":
            raise InputError(f"--targets {kind}: this teacher gives a sample, which is no teacher for another cache")
        if kind == "sampled" or (options.k or 0) > given_k:
            raise InputError(
                f"--targets {kind}: this teacher gives {given_k} classes of a token; use --targets top_k, --k up to "
                "that"
            )
    k = min(_num_classes(options, vocab, given_k), vocab)
    encoding = _kept_encoding(vocab, options, k)
    if kind == "sampled" and not 1 <= encoding.num_draws <= 255:
        fits = f"between {max(k - 255, 0)} and {k - 1}"
        raise InputError(f"--exact={encoding.num_exact}: of k={k} classes 1 to 255 are draws; set it {fits}")
    described = {"kind": kind, "k": k, "top_p": options.top_p, "num_exact": encoding.num_exact}
    described |= {"num_draws": encoding.num_draws, "value_bits": encoding.value_bits, "temperature": temperature}
    return described | ({"seed": options.seed or 0} if kind == "sampled" else {}), encoding


def _dense_rows(targets: Targets, kind: str, start: int, stop: int) -> Tensor:
    """Hidden states or logits of a range of tokens."""
    if kind == "hidden" and isinstance(targets, HiddenTargets):
        return targets.hidden[start:stop]
    if kind == "hidden" or isinstance(targets, TopKTargets):
        raise InputError(f"--targets {kind}: this teacher does not give them; use --targets top_k")
    return targets.logits(start, stop)


def _num_classes(options: CacheOptions, vocab: int, given: int | None) -> int:
    if options.bytes_per_token is None:
        return options.k or given or DEFAULT_K
    most = range(1, min(vocab, MOST_CLASSES) + 1)
    fits = [k for k in most if _bytes_of(vocab, options, k) <= options.bytes_per_token]
    if not fits:
        least = _bytes_of(vocab, options, 1)
        raise InputError(f"--bytes-per-token={options.bytes_per_token}: one class takes {least:.1f}; raise it")
    return fits[-1]


def _bytes_of(vocab: int, options: CacheOptions, k: int) -> float:
    """Of a token with k classes."""
    return _kept_encoding(vocab, options, k).most_bytes(1000, k) / 1000


def _kept_encoding(vocab: int, options: CacheOptions, k: int) -> KeptEncoding:
    """Of k classes, or of a sample of k: those that are not kept for sure are draws."""
    bits = options.value_bits or VALUE_BITS
    if options.kind != "sampled":
        return KeptEncoding(vocab, bits)
    num_exact = options.exact_of(k)
    return KeptEncoding(vocab, bits, max(k - num_exact, 0), num_exact)


def _identified(recipe: config.LanguageRecipe, teacher: Teacher) -> dict[str, Any]:
    """The manifest's `teacher`."""
    identities = []
    for section, part in zip(recipe.teachers, teacher.parts, strict=True):
        said = section.model_dump(exclude=config.HOW_ASKED)
        if isinstance(section, config.InProcess) and part.model is not None:
            said = {"dtype": section.dtype, "quantization": section.quantization}
            said |= {"config": config_digest(part.model.config), "weights": weights_digest(part.model)}
        identities.append(said)
    revisions = [getattr(getattr(part.model, "config", None), "_commit_hash", None) for part in teacher.parts]
    weights = list(getattr(recipe.teacher, "weights", ()))
    assert recipe.teacher is not None
    return {
        "identity": identities + ([weights] if weights else []),
        "section": recipe.teacher.model_dump(),
        "revision": revisions[0] if len(revisions) == 1 else revisions,
    }
