"""Instruction data: rows -> a prompt and a completion -> token ids and a loss mask. Imports no torch."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abkd.data.sources import read_rows
from abkd.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
FORMATS = '{"prompt", "completion"}, {"messages"}, {"instruction", "input", "output"} or {"question", "answer"}'
INPUTS, OUTPUTS = ("input", "context"), ("output", "response")  # Alpaca, Self-Instruct, Super-NI; Dolly
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""The prompts of Alpaca (Taori et al., 2023), which the ABKD paper trains and evaluates with."""


@dataclass(frozen=True)
class Instruction:
    """One row: the conversation up to the completion, and the completion, which alone is learnt."""

    prompt: tuple[dict[str, str], ...]
    """Messages {"role", "content"}; a row without roles is one user message."""
    completion: str
    origin: str
    """`file:line`, for messages about the row."""
    input: str = ""
    """What the instruction is applied to, where the row has it apart; the last message ends with it as well."""
    references: tuple[str, ...] = ()
    """Further right answers, the completion first; empty where the completion is the only one."""


@dataclass(frozen=True)
class Example:
    """One instruction as token ids. The end token is the completion's last id, unless it was cut off."""

    example_id: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    prompt: str
    """What the model reads before the completion, as text, chat template included."""
    question: str
    """The last message of the prompt, without the template: for people."""
    completion: str
    references: tuple[str, ...] = ()
    """All right answers; empty where the completion is the only one."""


@dataclass(frozen=True)
class EncodingCounts:
    """What became of the rows, for the log."""

    num_examples: int
    num_tokens: int
    """Completion tokens, which are the ones that count."""
    num_long_prompts_dropped: int
    num_completions_cut: int


def read_instructions(
    path: Path | str, field: str, *, subset: str = "", split: str = "train", stream_rows: int = 0
) -> list[Instruction]:
    """Every row of a file, folder or data set; the arguments are those of `abkd.data.sources.read_rows`.

    Rows are conversations (`messages`; the last one, an assistant's, is the completion), `instruction`, optional
    `input` (or `context`) and `output` (or `response`; a list holds several right answers, the first is learnt),
    `instruction` and `instances` of input and output, `question` and `answer`, or prompt-completion (`prompt` and
    `completion`, both text or both lists of messages). Other keys are ignored.

    Raises:
        InputError: it is missing or empty, or a row is malformed: with file, line and field.
    """
    rows = read_rows(str(path), field, subset=subset, split=split, stream_rows=stream_rows)
    instructions = [instruction for origin, row in rows for instruction in _parse(row, origin)]
    if not instructions:
        raise InputError(f"{field}: {path} is empty; it must hold one object a row: {FORMATS}")
    return instructions


def row_of(instruction: Instruction, completion: str) -> dict[str, Any]:
    """The row of a JSONL file that `read_instructions` reads as `instruction` with another completion."""
    last = instruction.prompt[-1]["content"]
    if len(instruction.prompt) > 1:
        return {"messages": [*instruction.prompt, {"role": "assistant", "content": completion}]}
    if instruction.input:
        question = last.removesuffix(f"\n\n{instruction.input}")
        return {"instruction": question, "input": instruction.input, "output": completion}
    return {"prompt": last, "completion": completion}


def hold_out(
    instructions: Sequence[Instruction], num_held_out: int, field: str
) -> tuple[list[Instruction], list[Instruction]]:
    """(rest, held out): a random `num_held_out` rows, always the same ones; both keep the file's order."""
    if num_held_out >= len(instructions):
        raise InputError(
            f"{field}={num_held_out} leaves nothing to train on: the file has {len(instructions)} rows; lower it"
        )
    chosen = set(random.Random(0).sample(range(len(instructions)), num_held_out))
    rest = [row for index, row in enumerate(instructions) if index not in chosen]
    return rest, [row for index, row in enumerate(instructions) if index in chosen]


def encode(
    instructions: Sequence[Instruction],
    tokenizer: Any,
    *,
    prompt_format: str,
    max_prompt_tokens: int,
    max_tokens: int,
    long_prompts: str,
    first_id: int = 0,
) -> tuple[list[Example], EncodingCounts]:
    """Token ids of every instruction; prompt and completion are tokenised apart, as when generating.

    Args:
        prompt_format: `chat` applies the tokenizer's chat template; `alpaca` the template `ALPACA`; `plain` joins
            the texts as they are.
        max_prompt_tokens: a longer prompt is refused, or its row dropped: see `long_prompts`.
        max_tokens: of prompt and completion together; a longer completion is cut, end token included.
        long_prompts: `refuse` or `drop`.
        first_id: example ids count from here.

    Raises:
        InputError: a prompt is too long and `long_prompts` is `refuse`; no example is left; the format does
            not fit the tokenizer or the rows.
    """
    if prompt_format == "chat" and not tokenizer.chat_template:
        raise InputError("data.prompt_format=chat, but the tokenizer has no chat template; use plain")
    examples: list[Example] = []
    num_dropped = num_cut = 0
    for row in instructions:
        prompt, completion = _as_text(row, tokenizer, prompt_format)
        prompt_ids = encode_prompt(prompt, row.origin, tokenizer, max_prompt_tokens, long_prompts)
        if prompt_ids is None:
            num_dropped += 1
            continue
        completion_ids = _completion_ids(completion, tokenizer)
        num_cut += len(completion_ids) > max_tokens - len(prompt_ids)
        completion_ids = completion_ids[: max_tokens - len(prompt_ids)]
        example = Example(
            example_id=first_id + len(examples),
            prompt_ids=tuple(prompt_ids),
            completion_ids=tuple(completion_ids),
            prompt=prompt,
            question=row.prompt[-1]["content"],
            completion=row.completion,
            references=row.references,
        )
        examples.append(example)
    if not examples:
        raise InputError(f"data: every prompt is longer than data.max_prompt_tokens={max_prompt_tokens}; raise it")
    num_tokens = sum(len(example.completion_ids) for example in examples)
    return examples, EncodingCounts(len(examples), num_tokens, num_dropped, num_cut)


def encode_prompt(
    prompt: str, origin: str, tokenizer: Any, max_prompt_tokens: int, long_prompts: str
) -> list[int] | None:
    """Ids of what `prompt_text` gives for the row at `origin`; None for a long one that is to be dropped."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"{origin}: the prompt has no tokens; give it some text")
    if len(ids) <= max_prompt_tokens:
        return ids
    if long_prompts == "refuse":
        raise InputError(
            f"{origin}: the prompt is {len(ids):,} tokens, data.max_prompt_tokens is {max_prompt_tokens:,}; raise it, "
            "or set data.long_prompts=drop"
        )
    return None


def prompt_text(row: Instruction, tokenizer: Any, prompt_format: str) -> str:
    """What a model reads before it answers."""
    if prompt_format == "chat":
        return _apply_template(row, list(row.prompt), tokenizer, add_generation_prompt=True)
    if len(row.prompt) > 1:
        raise InputError(f"{row.origin}: a conversation needs data.prompt_format=chat")
    question = row.prompt[0]["content"]
    if prompt_format == "plain":
        return question
    if not row.input:
        return ALPACA.format(instruction=question)
    return ALPACA_WITH_INPUT.format(instruction=question.removesuffix(f"\n\n{row.input}"), input=row.input)


def _as_text(row: Instruction, tokenizer: Any, prompt_format: str) -> tuple[str, str]:
    if prompt_format != "chat":
        return prompt_text(row, tokenizer, prompt_format), row.completion
    prompt = prompt_text(row, tokenizer, prompt_format)
    messages = [*row.prompt, {"role": "assistant", "content": row.completion}]
    whole = _apply_template(row, messages, tokenizer)
    if not whole.startswith(prompt):
        raise InputError(
            f"{row.origin}: the tokenizer's chat template does not continue its own generation prompt, so the "
            "completion cannot be told from the prompt; use data.prompt_format=plain"
        )
    return prompt, whole[len(prompt) :]


def _apply_template(row: Instruction, messages: list, tokenizer: Any, **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as error:
        raise InputError(
            f"{row.origin}: the tokenizer's chat template refuses the conversation ({error}); change the row, or use "
            "data.prompt_format=plain"
        ) from error


def _completion_ids(completion: str, tokenizer: Any) -> list[int]:
    """Ids up to and with the first end token; one is added where the template writes none."""
    ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [*ids[: ids.index(end)], end] if end in ids else [*ids, end]


def _parse(row: Any, origin: str) -> list[Instruction]:
    if not isinstance(row, dict):
        raise InputError(f"{origin}: must be a JSON object, is {type(row).__name__}: {FORMATS}")
    if "messages" in row:
        messages = _messages(row, "messages", origin)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise InputError(f"{origin}: field 'messages' must end with an assistant's message after a user's")
        return [Instruction(tuple(messages[:-1]), _not_empty(messages[-1]["content"], "messages", origin), origin)]
    if "prompt" in row and ("completion" in row or "instruction" not in row):
        return [_prompt_completion(row, origin)]
    if "instruction" in row:
        instruction = _text(row, "instruction", origin)
        return [_task(instruction, *each) for each in _instances(row, origin)]
    if "question" in row:
        return [_single(_text(row, "question", origin), _text(row, "answer", origin), origin)]
    raise InputError(f"{origin}: has the fields {sorted(row)}; needs {FORMATS}")


def _prompt_completion(row: dict, origin: str) -> Instruction:
    if not isinstance(row["prompt"], list):
        return _single(_text(row, "prompt", origin), _text(row, "completion", origin), origin)
    completion = _messages(row, "completion", origin)
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        raise InputError(f"{origin}: field 'completion' must be one assistant's message, as 'prompt' is a list")
    answer = _not_empty(completion[0]["content"], "completion", origin)
    return Instruction(tuple(_messages(row, "prompt", origin)), answer, origin)


def _single(prompt: str, completion: str, origin: str) -> Instruction:
    return Instruction(({"role": "user", "content": prompt},), completion, origin)


def _instances(row: dict, origin: str) -> Iterator[tuple[dict, str]]:
    """The pairs of input and output of an instruction, and where each stands."""
    if "instances" not in row:
        yield row, origin
        return
    instances = row["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(each, dict) for each in instances):
        raise InputError(f"{origin}: field 'instances' must be a list of {{'input', 'output'}}, one at least")
    for index, each in enumerate(instances):
        yield each, f"{origin}: instances[{index}]"


def _task(instruction: str, row: dict, origin: str) -> Instruction:
    given = next((name for name in INPUTS if row.get(name)), None)
    text = _text(row, given, origin) if given else ""
    answer = next((name for name in OUTPUTS if name in row), OUTPUTS[0])
    several = row.get(answer)
    if not isinstance(several, list):
        several = [_text(row, answer, origin)]
    elif not several:
        raise InputError(f"{origin}: field {answer!r} is an empty list; give it a right answer or remove the row")
    answers = [_text({answer: each}, answer, origin) for each in several]
    question = f"{instruction}\n\n{text}" if text else instruction
    message = {"role": "user", "content": question}
    return Instruction((message,), answers[0], origin, text, tuple(answers) if len(answers) > 1 else ())


def _text(row: dict, field: str, origin: str) -> str:
    if field not in row:
        raise InputError(f"{origin}: field {field!r} is missing; add it as text")
    if not isinstance(row[field], str):
        raise InputError(f"{origin}: field {field!r} must be text, is {type(row[field]).__name__}")
    return _not_empty(row[field], field, origin)


def _not_empty(text: str, field: str, origin: str) -> str:
    if not text.strip():
        raise InputError(f"{origin}: field {field!r} is empty; fill it or remove the row")
    return text


def _messages(row: dict, field: str, origin: str) -> list[dict[str, str]]:
    messages = row.get(field)
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{origin}: field {field!r} must be a list of messages {{'role', 'content'}}")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise InputError(f"{origin}: field {field!r}[{index}] must be {{'role', 'content'}} with text as content")
        if message.get("role") not in ROLES:
            raise InputError(
                f"{origin}: field {field!r}[{index}] has the role {message.get('role')!r}; use one of {ROLES}"
            )
        if message["role"] == "user":
            _not_empty(message["content"], f"{field}[{index}]", origin)
    return [{"role": message["role"], "content": message["content"]} for message in messages]
