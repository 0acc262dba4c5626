"""A teacher behind an HTTP server, which writes down the log-probabilities of a prompt's tokens."""

import math
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from abkd.errors import InputError
from abkd.targets import TopKTargets
from abkd.teachers.connection import Connection, Malformed, Refused
from abkd.teachers.servers import Api, Dialect, Entry, find_dialect
from abkd.teachers.teacher import Teacher

_NO_LOG_PROB = -1e3  # at or below, a server's way to write -inf
_UNSEEN = 2.0**-24  # of 1, in fp32
_MASS_TOLERANCE, _LOG_PROB_TOLERANCE = 0.01, 1e-3
_OTHER = "its model has another vocabulary; serve the teacher whose tokenizer the student has"
_NO_LOGITS = "let the server give log-probabilities, not logits or what a sampler made of them"

Row = dict[int, float]
"""Class -> log-probability, finite."""


class ServedTeacher(Teacher):
    """Asks a server for the k likeliest classes of each token that counts, and of the token that is there.

    The examples of a batch are asked for side by side. Rows are those of temperature 1, before any sampler, so
    `targets` are at temperature 1. Nothing is remembered: each time a batch comes by it is asked for again.

    Args:
        url: of the server, like http://127.0.0.1:8000; see `Connection`, as for api_key, timeout_s and patience_s.
        model: the name that it serves the teacher under.
        tokenizer: of the student; the server's must give the same ids.
        vocab: classes of the teacher's rows.
        k: classes asked for, 1 to vocab.
        tail: what is made of the mass of the others; see `TopKTargets`.
        api: how the server is spoken to; auto finds out, at the first question.
        num_connections: questions in flight, at most.

    Raises:
        InputError: k or tail out of range; what `Connection` raises.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        tokenizer: Any,
        vocab: int,
        k: int,
        tail: Literal["lump", "uniform", "renormalise"],
        api: Literal["auto"] | Api = "auto",
        num_connections: int = 8,
        timeout_s: float = 120.0,
        patience_s: float = 300.0,
        api_key: str | None = None,
    ):
        if not 1 <= k <= vocab:
            raise InputError(f"teacher.k must lie between 1 and the teacher's {vocab} classes, got {k!r}")
        if tail not in ("lump", "uniform", "renormalise"):
            raise InputError(f"teacher.tail must be lump, uniform or renormalise for a served teacher, got {tail!r}")
        self.context: int | None = None
        """Tokens of the longest example that the server takes, after `check`, where it says so."""
        self._connection = Connection(
            url, num_connections=num_connections, timeout_s=timeout_s, patience_s=patience_s, api_key=api_key
        )
        self._name, self._tokenizer, self._k, self._tail = model, tokenizer, k, tail
        self._api, self._num_connections = api, num_connections
        self._served_vocab = self._vocab = vocab

    @cached_property
    def _dialect(self) -> Dialect:
        return find_dialect(self._connection, self._name, self._api)

    @property
    def vocab(self) -> int:
        return self._vocab

    @property
    def num_classes(self) -> int:  # the token that is there may be one more
        return min(self._k + 1, self._served_vocab)

    @property
    def approximation(self) -> str:
        return f"the {self._k} likeliest classes, tail={self._tail}"

    def narrow(self, vocab: int) -> None:
        """Rows leave out what they keep from `vocab` on, and are scaled up; their rest is taken to lie below."""
        self._vocab = vocab

    def targets(self, *, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, example_ids: Tensor) -> TopKTargets:
        """On `input_ids.device`, at temperature 1; arguments as `Teacher.targets`, padding on the right.

        Raises:
            ServerLost: the server did not answer for `patience_s`.
            InputError: it refuses, or its answer makes no sense; padding on the left.
        """
        if bool((attention_mask.diff(dim=1) > 0).any()):
            raise InputError("a served teacher reads examples that are padded on the right, and this batch is not")
        asked = [
            (f"example {name}", ids, [place for place, counts in enumerate(counted, start=1) if counts])
            for name, ids, counted in zip(example_ids.tolist(), input_ids.tolist(), mask.tolist(), strict=True)
        ]
        answers = self._connection.map(lambda one: self._ask(*one), [one for one in asked if one[2]])
        return self._targets([row for rows in answers for row in rows], input_ids.device)

    def check(self, samples: Sequence[Sequence[int]]) -> list[str]:
        """Asks what a training would only meet later: that the server is there, serves the model, reads the same ids.

        Args:
            samples: ids of a few examples, two tokens or more each; a row of the longest is asked for.

        Returns:
            What was found, in lines.

        Raises:
            ServerLost, InputError: what is wrong, in one line.
        """
        try:
            return [*self._check_model(), *self._check_tokenizer(samples), *self._check_row(samples)]
        except Malformed as error:
            raise self._error(f"its answer makes no sense: {error.what}", error.way_out) from None
        except Refused as error:
            raise self._refused(error) from None

    def _check_model(self) -> list[str]:
        names = self._dialect.models()
        if self._name not in names:
            raise self._error(
                f"serves {', '.join(names) or 'nothing'}, not {self._name}", "set teacher.model to one of them"
            )
        self.context, num_at_once = self._dialect.longest(), self._dialect.num_at_once()
        longest = f"up to {self.context}" if self.context else "nobody knows how many"
        lines = [
            f"teacher: the server at {self._connection.url} is asked as {type(self._dialect).__name__} "
            f"({self._dialect.known_by}) for {self._name}, examples of {longest} tokens"
        ]
        if num_at_once is not None and num_at_once < self._num_connections:
            lines.append(
                f"teacher: the server works at {num_at_once} questions at once, and teacher.num_connections="
                f"{self._num_connections}: more disturb its cache; set it to {num_at_once}"
            )
        return lines

    def _check_tokenizer(self, samples: Sequence[Sequence[int]]) -> list[str]:
        for sample in samples:
            text = self._tokenizer.decode(list(sample), clean_up_tokenization_spaces=False)
            theirs, ours = self._dialect.tokenize(text), self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if theirs is None:
                return self._check_texts(samples)
            if theirs != ours:
                place = next(i for i in range(len(ours) + 1) if theirs[i : i + 1] != ours[i : i + 1])
                shown = [
                    f"{ids[place : place + 1]} ({self._tokenizer.decode(ids[place : place + 1])!r})"
                    for ids in (ours, theirs)
                ]
                raise self._error(
                    f"splits {text[:60]!r} at token {place} into {shown[1]}, and here it is {shown[0]}", _OTHER
                )
        return [f"teacher: the server's tokenizer gives the same ids on {len(samples)} samples"]

    def _check_texts(self, samples: Sequence[Sequence[int]]) -> list[str]:
        """Where the server does not tokenize: what the classes of a row read like."""
        sample, num_same = max(samples, key=len), 0
        for entry in next(self._dialect.rows(sample, [len(sample) - 1], self._k, texts=True)):
            if not isinstance(entry.text, str) or not isinstance(entry.id, int):
                continue
            ours = self._tokenizer.decode([entry.id])
            if not (ours.isascii() and entry.text.isascii()):  # a token may be part of a character
                continue
            if ours.strip() != entry.text.strip():
                raise self._error(f"reads token {entry.id} as {entry.text!r}, and here it is {ours!r}", _OTHER)
            num_same += 1
        return [f"teacher: the server does not tokenize; {num_same} tokens of a row read the same there and here"]

    def _check_row(self, samples: Sequence[Sequence[int]]) -> list[str]:
        sample = max(samples, key=len)
        started = time.monotonic()
        [row] = self._ask("the longest sample", sample, [len(sample) - 1])
        return [
            f"teacher: {len(row)} classes of a token after {len(sample) - 1} others came in "
            f"{time.monotonic() - started:.2f} s, with a mass of {_mass(row):.4f}"
        ]

    def _ask(self, name: str, ids: Sequence[int], places: Sequence[int]) -> list[Row]:
        """The rows of the tokens at `places`; ids after the last are not sent."""
        if self.context is not None and places[-1] >= self.context:
            what = f"takes {self.context} tokens at most, and {name} has {places[-1] + 1} to the last that counts"
            raise self._error(what, "start it with a larger context, or lower data.max_tokens")
        rows: list[Row] = []
        try:
            for entries in self._dialect.rows(ids, places, self._k):
                rows.append(_checked(entries, self._k, self._served_vocab))
        except Malformed as error:
            what = f"its answer on {name}, token {places[len(rows)]}, makes no sense: {error.what}"
            raise self._error(what, error.way_out) from None
        except Refused as error:
            raise self._refused(error) from None
        return rows

    def _targets(self, rows: Sequence[Row], device: torch.device) -> TopKTargets:
        rows = [self._narrowed(row) for row in rows]
        width = max((len(row) for row in rows), default=min(self._k, self._vocab))
        ids = [[*row.keys(), *[0] * (width - len(row))] for row in rows]
        log_probs = [[*row.values(), *[-math.inf] * (width - len(row))] for row in rows]
        return TopKTargets(
            torch.tensor(ids, dtype=torch.long, device=device).view(-1, width),
            torch.tensor(log_probs, dtype=torch.float32, device=device).view(-1, width),
            torch.tensor([self._log_rest(row) for row in rows], dtype=torch.float32, device=device),
            self._vocab,
            self._tail,
        )

    def _narrowed(self, row: Row) -> Row:
        """Without the classes from `vocab` on."""
        kept = {index: log_prob for index, log_prob in row.items() if index < self._vocab}
        if len(kept) == len(row):
            return row
        left = 1 - _mass(row) + _mass(kept)
        if not kept or left <= 0:
            raise self._error(f"gives a row of padding, {sorted(row)[:5]}", _OTHER)
        return {index: log_prob - math.log(left) for index, log_prob in kept.items()}

    def _log_rest(self, row: Row) -> float:
        """ln of the mass of the classes that `row` leaves out.

        What the server's fp32 cannot tell from 0 is more than that, and no more than the least of `row` for each class.
        """
        if (num_others := self._vocab - len(row)) == 0:
            return -math.inf
        rest = 1 - _mass(row)
        return math.log(rest) if rest > _UNSEEN else min(math.log(_UNSEEN), min(row.values()) + math.log(num_others))

    def _error(self, what: str, way_out: str) -> InputError:
        return InputError(
            self._connection.without_key(f"teacher: the server at {self._connection.url}: {what}; {way_out}")
        )

    def _refused(self, refusal: Refused) -> InputError:
        return self._error(f"answers {refusal.status}: {refusal.said}", self._dialect.way_out(refusal, self._k))


def _checked(entries: Sequence[Entry], k: int, vocab: int) -> Row:
    """The row that a server wrote, the likeliest class first, without those of probability 0.

    Raises Malformed where it is none.
    """
    if len(entries) < min(k, vocab):
        raise Malformed(f"{len(entries)} classes, and teacher.k={k}", "lower teacher.k, or let the server give more")
    row: Row = {}
    for entry in entries:
        if type(entry.id) is not int or not 0 <= entry.id < vocab:
            raise Malformed(f"class {str(entry.id)[:40]!r} is none of 0 to {vocab - 1}", _OTHER)
        if type(entry.log_prob) not in (int, float) or not entry.log_prob <= _LOG_PROB_TOLERANCE:
            raise Malformed(f"class {entry.id} has the log-probability {str(entry.log_prob)[:40]!r}", _NO_LOGITS)
        if entry.id in row:
            raise Malformed(f"class {entry.id} is there twice", _NO_LOGITS)
        row[entry.id] = float(entry.log_prob) if entry.log_prob > _NO_LOG_PROB else -math.inf
    if not 0 < _mass(row) < 1 + _MASS_TOLERANCE:
        raise Malformed(f"its classes have a mass of {_mass(row):.4g}", _NO_LOGITS)
    falling = sorted(row.items(), key=lambda item: item[1], reverse=True)
    return {index: log_prob for index, log_prob in falling if log_prob > -math.inf}


def _mass(row: Row) -> float:
    return math.fsum(math.exp(log_prob) for log_prob in row.values())
