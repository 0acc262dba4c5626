"""What servers of language models are asked for the rows of a prompt, and how they answer.

Every request says temperature 1, and asks for rows that no sampler has touched:

    vLLM        POST /v1/completions, prompt_logprobs. All rows of the prompt, made before the sampler.
    SGLang      POST /generate, return_logprob. Rows from logprob_start_len + 1 on; where the server divides logits
                by the temperature first, it is the one that was sent.
    llama.cpp   POST /completion, n_probs. The row after the prompt alone, so one request a row; the model's, not the
                sampler's, as post_sampling_probs is false.

Sources, for the names of fields: answers of vLLM 0.32.0 and of llama.cpp as in xllamacpp 2026.10.11549; of SGLang,
which was not at hand, its `GenerateReqInput` and `SchedulerLogprobResultProcessor`.
"""

import abc
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from abkd.errors import InputError
from abkd.teachers.connection import Connection, Malformed, Refused, expecting, read, read_list

Api = Literal["vllm", "sglang", "llama_cpp"]
_CERTAIN = 1e6  # added to a logit, so that the sampler takes no other token


class Entry(NamedTuple):
    """A class of a row as the server wrote it, not checked."""

    id: Any
    log_prob: Any
    text: Any = None


class Dialect(abc.ABC):
    """How one kind of server is spoken to, and nothing about who asks."""

    owner: ClassVar[str]
    """What /v1/models says in `owned_by`."""
    fact: ClassVar[tuple[str, str]]
    """A path that this kind alone answers, and a key of the answer."""
    ways_out: ClassVar[dict[str, str]]
    """Words in a refusal -> what to do about it."""

    def __init__(self, connection: Connection, model: str, known_by: str):
        self.connection, self.model = connection, model
        self.known_by = known_by
        """The fact that the server is of this kind."""

    @abc.abstractmethod
    def rows(self, ids: Sequence[int], places: Sequence[int], k: int, *, texts: bool = False) -> Iterator[list[Entry]]:
        """For each of `places`, ascending and above 0, the k likeliest classes of the token there, in any order.

        The token that is there may be one more.

        Args:
            texts: with what each class reads like, where that costs the server something.

        Raises:
            ServerLost, Refused, Malformed.
        """

    def longest(self) -> int | None:
        """Tokens of the longest example that can be asked for; None where the server does not say.

        Here one less than the context, which must have room for a new token.
        """
        cards = read_list(self.connection.ask("/v1/models"), "data")
        context = next((card.get("max_model_len") for card in cards if read(card, "id") == self.model), None)
        return None if context is None else _count(context) - 1

    def num_at_once(self) -> int | None:
        """Requests that the server works at side by side; None where that is its own affair."""
        return None

    def models(self) -> list[str]:
        """Names that the server answers to."""
        cards = read_list(self.connection.ask("/v1/models"), "data")
        names = [str(name) for card in cards for name in [read(card, "id"), *(card.get("aliases") or [])]]
        return list(dict.fromkeys(names))  # llama.cpp gives the id as an alias too

    def tokenize(self, text: str) -> list[int] | None:
        """Ids of `text`, special tokens read and none added; None where the server does not do that."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        return self._tokens(body)

    def _tokens(self, body: dict[str, Any]) -> list[int] | None:
        try:
            ids = list(read_list(self.connection.ask("/tokenize", body), "tokens"))
        except Refused as error:
            if error.status in (404, 405, 501):
                return None
            raise
        if not all(type(index) is int and index >= 0 for index in ids):
            raise Malformed("its /tokenize gives something else than ids")
        return ids

    def way_out(self, refusal: Refused, k: int) -> str:
        """What to do about a refusal."""
        ways = {word: way for word, way in self.ways_out.items() if word in refusal.said}
        ways |= {"": "give another teacher.api_key"} if refusal.status in (401, 403) else {}
        return next(iter(ways.values()), "change what it names").format(k=k)


class VLLM(Dialect):
    """`prompt_logprobs`: all rows of a prompt in one answer, {id: {"logprob", "rank", "decoded_token"}} each."""

    owner, fact = "vllm", ("/version", "version")
    ways_out: ClassVar = {
        "max allowed": "start it with --max-logprobs {k}, or lower teacher.k",
        "out of vocabulary": "serve the teacher whose tokenizer the student has",
        "context length": "start it with a larger --max-model-len, or lower data.max_tokens",
        "does not exist": "set teacher.model to one that it serves",
    }

    def rows(self, ids: Sequence[int], places: Sequence[int], k: int, *, texts: bool = False) -> Iterator[list[Entry]]:
        prompt = list(ids[: places[-1] + 1])
        body = {"model": self.model, "prompt": prompt, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": k}
        answer = self.connection.ask("/v1/completions", body)
        rows = read_list(answer, "choices", 0, "prompt_logprobs")
        _check_count(len(rows), len(prompt), "positions")
        for place in places:
            yield self._row(rows[place], ids[place])

    @staticmethod
    def _row(row: Any, there: int) -> list[Entry]:
        read(row, str(there))  # it has one of its own: rows that are shifted show
        with expecting("row {id: {logprob, ...}}"):
            return [Entry(_id(key), value["logprob"], value.get("decoded_token")) for key, value in row.items()]


class SGLang(Dialect):
    """`input_top_logprobs`, [log-probability, id, text] each, and the tokens that are there in `input_token_logprobs`.

    Both start with an empty entry for the token at `logprob_start_len`, which nothing before it predicts here.
    """

    owner, fact = "sglang", ("/get_model_info", "model_path")
    ways_out: ClassVar = {
        "context length": "start it with a larger --context-length, or lower data.max_tokens",
        "longer than": "start it with a larger --context-length, or lower data.max_tokens",
    }

    def rows(self, ids: Sequence[int], places: Sequence[int], k: int, *, texts: bool = False) -> Iterator[list[Entry]]:
        prompt, start = list(ids[: places[-1] + 1]), places[0] - 1
        body = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": start,
            "top_logprobs_num": k,
            "return_text_in_logprobs": texts,
        }
        answer = self.connection.ask("/generate", body)
        top = read_list(answer, "meta_info", "input_top_logprobs")
        there = read_list(answer, "meta_info", "input_token_logprobs")
        _check_count(min(len(top), len(there)), len(prompt) - start, "positions")
        for place in places:
            yield self._row(read_list(top, place - start), there[place - start], ids[place])

    @staticmethod
    def _row(top: Sequence[Any], there: Any, token: int) -> list[Entry]:
        if read(there, 1) not in (token, 0):  # 0 stands for the last ids of the vocabulary too
            raise Malformed(f"it writes of token {there[1]!r} where {token} was sent")
        with expecting("row [[logprob, id, text], ...]"):
            row = [Entry(index, log_prob, text) for log_prob, index, text in top]
            return row if any(entry.id == token for entry in row) else [*row, Entry(token, there[0], there[2])]


class LlamaCpp(Dialect):
    """The row after the prompt alone: one request a row, each prompt a token longer, which the server's cache knows.

    Without a bias, which the sampler alone sees, it would draw half a character now and then, and then write no row.
    """

    owner, fact = "llamacpp", ("/props", "default_generation_settings")
    ways_out: ClassVar = {
        "context size": "start it with a larger --ctx-size, or lower data.max_tokens",
        "invalid tokens": "serve the teacher whose tokenizer the student has",
    }

    def rows(self, ids: Sequence[int], places: Sequence[int], k: int, *, texts: bool = False) -> Iterator[list[Entry]]:
        return (self._row(list(ids[:place]), k) for place in places)

    def _row(self, prompt: list[int], k: int) -> list[Entry]:
        body = {
            "model": self.model,
            "prompt": prompt,
            "n_predict": 1,
            "temperature": 1.0,
            "n_probs": k,
            "post_sampling_probs": False,
            "cache_prompt": True,
            "logit_bias": [["a", _CERTAIN]],
        }
        answer = self.connection.ask("/completion", body)
        _check_count(read(answer, "tokens_evaluated"), len(prompt), "tokens")
        row = read_list(answer, "completion_probabilities", 0, "top_logprobs")
        with expecting("row [{id, logprob, ...}, ...]"):
            return [Entry(entry["id"], entry["logprob"], entry.get("token")) for entry in row]

    def longest(self) -> int | None:
        """The last token of an example is not sent."""
        return _count(read(self.connection.ask("/props"), "default_generation_settings", "n_ctx"))

    def num_at_once(self) -> int | None:
        return _count(read(self.connection.ask("/props"), "total_slots"))

    def tokenize(self, text: str) -> list[int] | None:
        return self._tokens({"content": text, "add_special": False, "parse_special": True})


DIALECTS: dict[str, type[Dialect]] = {"vllm": VLLM, "sglang": SGLang, "llama_cpp": LlamaCpp}


def find_dialect(connection: Connection, model: str, api: str) -> Dialect:
    """That of `api`, or for auto that of the server, by what it answers. Raises InputError where nothing tells."""
    if api != "auto":
        return DIALECTS[api](connection, model, f"teacher.api={api}")
    try:
        owner = read(connection.ask("/v1/models"), "data", 0, "owned_by")
    except Malformed:
        owner = None
    except Refused as error:
        owner = None
        if error.status in (401, 403):
            raise InputError(
                f"teacher.api_key: {connection.url} answers {error.status}: {error.said}; give another"
            ) from None
    for dialect in DIALECTS.values():
        if owner == dialect.owner:
            return dialect(connection, model, f"its /v1/models is owned by {owner}")
    for dialect in DIALECTS.values():
        if connection.finds(*dialect.fact):
            return dialect(connection, model, f"it answers {dialect.fact[0]} with {dialect.fact[1]}")
    raise InputError(
        f"teacher.api: nothing tells what kind of server is at {connection.url}; set it to one of {', '.join(DIALECTS)}"
    )


def _id(key: str) -> int | str:
    """Of a key of JSON, which is a string."""
    return int(key) if key.isascii() and key.isdecimal() else key


def _count(found: Any) -> int:
    if type(found) is not int or found < 1:
        raise Malformed(f"{str(found)[:40]!r} stands where a count should")
    return found


def _check_count(found: Any, sent: int, what: str) -> None:
    if found != sent:
        raise Malformed(
            f"it gives {found} {what}, and {sent} were sent or asked for",
            "serve a model that reads ids as they are, with no token added or cut",
        )
