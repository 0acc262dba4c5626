"""What of the teacher is written down: the command line's options, checked before torch is imported."""

import argparse
from dataclasses import dataclass

from abkd.errors import InputError
from abkd.teachers.cache.manifest import MOST_CLASSES

KINDS = ("top_k", "sampled", "hidden", "logits")
SHARD_ROWS = 65_536
"""Tokens or images of a shard, unless their rows are wide."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class CacheOptions:
    kind: str = "top_k"
    """top_k, sampled, hidden or logits."""
    k: int | None = None
    """Classes of a token; None is 50, or as many as a server is asked for."""
    num_exact: int | None = None
    """Of a sample: classes that are kept for sure; None is half of k. The others are draws."""
    top_p: float = 1.0
    bytes_per_token: int | None = None
    """In the place of k."""
    value_bits: int | None = None
    """Of a kept class's log-probability; None is 12."""
    temperature: float | None = None
    """Of top-k targets and samples; None is that of the recipe's objective."""
    dtype: str | None = None
    """Of hidden states and logits; None is the teacher's own."""
    shard_tokens: int | None = None
    """None is 65,536, or of wide rows as many as take a GiB."""
    batch_size: int | None = None
    """Examples that the teacher reads at once; None is 8, or of images evaluation.batch_size."""
    seed: int | None = None
    """Of the draws of a sample; None is 0."""

    def exact_of(self, k: int) -> int:
        """Of a sample of k classes: how many are kept for sure."""
        return k // 2 if self.num_exact is None else self.num_exact

    def __post_init__(self):
        reduced = self.kind in ("top_k", "sampled")
        if reduced and self.dtype is not None:
            raise InputError(f"--dtype={self.dtype}: is of hidden states and logits; leave it out, or set --value-bits")
        for name in ("k", "num_exact", "bytes_per_token", "temperature", "value_bits"):
            if not reduced and getattr(self, name) is not None:
                flag = {"num_exact": "exact"}.get(name, name.replace("_", "-"))
                raise InputError(f"--{flag}: --targets {self.kind} keeps everything; leave it out")
        if self.kind != "top_k" and self.top_p < 1:
            raise InputError(f"--top-p={self.top_p:g}: is of --targets top_k; leave it out")
        if self.kind != "sampled" and self.num_exact is not None:
            raise InputError(f"--exact={self.num_exact}: is of --targets sampled; leave it out")
        if self.kind != "sampled" and self.seed is not None:
            raise InputError(f"--seed={self.seed}: is of the draws of --targets sampled; leave it out")
        if self.k is not None and self.bytes_per_token is not None:
            raise InputError("--k and --bytes-per-token say the same; give one of them")
        if (self.k or 0) > MOST_CLASSES:
            raise InputError(
                f"--k={self.k}: must be at most {MOST_CLASSES}; to keep more, use --targets hidden or logits"
            )
        if self.value_bits is not None and not 4 <= self.value_bits <= 16:
            raise InputError(f"--value-bits={self.value_bits}: must lie between 4 and 16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="FOLDER", help="of the cache; go on with it if it is there")
    parser.add_argument("--targets", choices=KINDS, default="top_k", help="what is kept of each token; default top_k")
    parser.add_argument("--k", type=int, help="classes of a token, 50 unless given; of sampled, half of them draws")
    parser.add_argument("--exact", type=int, help="of sampled: classes kept for sure, the others of k are drawn")
    parser.add_argument("--top-p", type=float, default=1.0, help="of top_k: no more classes than hold this mass")
    parser.add_argument("--bytes-per-token", type=int, help="the largest k that takes no more")
    parser.add_argument(
        "--value-bits", type=int, help="of a log-probability, 4 to 16, 12 unless given; error 32/(2^bits-1)"
    )
    parser.add_argument("--temperature", type=float, help="of top_k and sampled; default: the objective's")
    parser.add_argument("--dtype", choices=DTYPES, help="of hidden and logits; default: the teacher's")
    parser.add_argument(
        "--shard-tokens", type=int, help="of a shard, the most that a kill loses; default: 65,536, or a GiB"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        help="examples that the teacher reads at once; default: 8, of images as for evaluation",
    )
    parser.add_argument("--seed", type=int, help="of the draws of sampled; default: 0")


def refuse_any(given: argparse.Namespace, command: str) -> None:
    """Raises InputError where an option is set, for a command that takes none of them."""
    plain = argparse.ArgumentParser()
    add_arguments(plain)
    for name, default in vars(plain.parse_args([])).items():
        if getattr(given, name) != default:
            raise InputError(f"--{name.replace('_', '-')}: is for writing a cache; leave it out of {command}")


def options_of(given: argparse.Namespace) -> CacheOptions:
    """Raises InputError for what is out of range or does not go together."""
    for name in ("k", "exact", "bytes_per_token", "shard_tokens", "batch_size"):
        value, least = getattr(given, name), 0 if name == "exact" else 1
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')}={value}: must be at least {least}")
    if not 0 < given.top_p <= 1:
        raise InputError(f"--top-p={given.top_p:g}: must be above 0, at most 1")
    if given.temperature is not None and not 0 < given.temperature < float("inf"):
        raise InputError(f"--temperature={given.temperature:g}: must be above 0")
    return CacheOptions(
        kind=given.targets,
        k=given.k,
        num_exact=given.exact,
        top_p=given.top_p,
        bytes_per_token=given.bytes_per_token,
        value_bits=given.value_bits,
        temperature=given.temperature,
        dtype=given.dtype,
        shard_tokens=given.shard_tokens,
        batch_size=given.batch_size,
        seed=given.seed,
    )
