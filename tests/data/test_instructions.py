"""Rows are read or refused with file, line and field; prompts and completions become the ids that generation sees."""

import gzip
import json

import pytest
from conftest import make_tokenizer

from abkd.data.instructions import EncodingCounts, Instruction, encode, hold_out, read_instructions
from abkd.errors import InputError

FORMATS = '{"prompt", "completion"}, {"messages"}, {"instruction", "input", "output"} or {"question", "answer"}'
GOOD = {"prompt": "a", "completion": "b"}
OPTIONS = {"prompt_format": "chat", "max_prompt_tokens": 64, "max_tokens": 128, "long_prompts": "refuse"}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def write(folder, *rows, name="rows.jsonl"):
    """A data file; rows that are not bytes are written as JSON."""
    file = folder / name
    file.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return file


def refusal(file) -> str:
    with pytest.raises(InputError) as caught:
        read_instructions(file, "data.train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Reading

ROWS = {
    "prompt and completion": (GOOD, (user("a"),), "b"),
    "other keys": (GOOD | {"source": "x"}, (user("a"),), "b"),
    "lists of messages": (
        {"prompt": [{"role": "system", "content": "s"}, user("a")], "completion": [assistant("b")]},
        ({"role": "system", "content": "s"}, user("a")),
        "b",
    ),
    "a conversation": (
        {"messages": [user("a"), assistant("b") | {"weight": 0}, user("c"), assistant("d")]},
        (user("a"), assistant("b"), user("c")),
        "d",
    ),
    "instruction": ({"instruction": "a", "output": "b"}, (user("a"),), "b"),
    "instruction and input": ({"instruction": "a", "input": "c", "output": "b"}, (user("a\n\nc"),), "b", "c"),
    "Dolly": ({"instruction": "a", "context": "c", "response": "b", "category": "x"}, (user("a\n\nc"),), "b", "c"),
    "MiniLLM": (
        {"prompt": "Below is a", "instruction": "a", "input": "c", "output": "b", "topic": "x"},
        (user("a\n\nc"),),
        "b",
        "c",
    ),
    "several answers": ({"instruction": "a", "output": ["b", "d"]}, (user("a"),), "b", "", ("b", "d")),
    "one answer in a list": ({"instruction": "a", "output": ["b"]}, (user("a"),), "b"),
    "question and answer": ({"question": "a", "answer": "b"}, (user("a"),), "b"),
    "instruction and empty input": ({"instruction": "a", "input": "", "output": "b"}, (user("a"),), "b"),
    "spaces kept": ({"prompt": " a\n", "completion": "b\u2028c "}, (user(" a\n"),), "b\u2028c "),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_becomes_a_prompt_and_a_completion(tmp_path, kind):
    row, prompt, completion, *more = ROWS[kind]
    file = write(tmp_path, row)
    assert read_instructions(file, "data.train") == [Instruction(prompt, completion, f"{file}:1", *more)]


def test_every_instance_of_an_instruction_is_a_row(tmp_path):
    instances = [{"input": "c", "output": "b"}, {"input": "", "output": "d"}]
    file = write(tmp_path, {"instruction": "a", "instances": instances})
    assert read_instructions(file, "data.train") == [
        Instruction((user("a\n\nc"),), "b", f"{file}:1: instances[0]", "c"),
        Instruction((user("a"),), "d", f"{file}:1: instances[1]"),
    ]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_lines_are_numbered_as_in_the_file_blank_ones_included(tmp_path, name):
    file = tmp_path / name
    content = "\ufeff" + '{"prompt": "ä", "completion": "€"}\r\n\r\n  \n{"prompt": "c", "completion": "d"}'
    file.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    rows = read_instructions(file, "data.train")
    assert [row.origin for row in rows] == [f"{file}:1", f"{file}:4"]
    assert [row.completion for row in rows] == ["€", "d"]


MALFORMED = {
    "torn JSON": (
        b'{"prompt": "a"',
        "not valid JSON (Expecting ',' delimiter, column 15); one object a line",
    ),
    "two objects": (b"{} {}", "not valid JSON (Extra data, column 4); one object a line"),
    "a list": (["a"], f"must be a JSON object, is list: {FORMATS}"),
    "text": ("a", f"must be a JSON object, is str: {FORMATS}"),
    "no known field": ({"text": 1, "label": 2}, f"has the fields ['label', 'text']; needs {FORMATS}"),
    "no answer": ({"question": "a"}, "field 'answer' is missing; add it as text"),
    "no right answer": (
        {"instruction": "a", "output": []},
        "field 'output' is an empty list; give it a right answer or remove the row",
    ),
    "an empty right answer": (
        {"instruction": "a", "output": ["b", ""]},
        "field 'output' is empty; fill it or remove the row",
    ),
    "no instances": (
        {"instruction": "a", "instances": []},
        "field 'instances' must be a list of {'input', 'output'}, one at least",
    ),
    "an instance without an output": (
        {"instruction": "a", "instances": [{"input": "", "output": "b"}, {"input": "c"}]},
        "instances[1]: field 'output' is missing; add it as text",
    ),
    "no completion": ({"prompt": "a"}, "field 'completion' is missing; add it as text"),
    "no output": ({"instruction": "a"}, "field 'output' is missing; add it as text"),
    "a number": ({"prompt": 1, "completion": "b"}, "field 'prompt' must be text, is int"),
    "null": ({"prompt": "a", "completion": None}, "field 'completion' must be text, is NoneType"),
    "input a number": ({"instruction": "a", "input": 5, "output": "b"}, "field 'input' must be text, is int"),
    "an empty prompt": ({"prompt": "", "completion": "b"}, "field 'prompt' is empty; fill it or remove the row"),
    "a blank completion": (
        {"prompt": "a", "completion": " \n"},
        "field 'completion' is empty; fill it or remove the row",
    ),
    "an empty answer": (
        {"messages": [user("a"), assistant("")]},
        "field 'messages' is empty; fill it or remove the row",
    ),
    "an empty question": (
        {"messages": [user(" "), assistant("b")]},
        "field 'messages[0]' is empty; fill it or remove the row",
    ),
    "a bad role": (
        {"messages": [{"role": "bot", "content": "a"}, assistant("b")]},
        "field 'messages'[0] has the role 'bot'; use one of ('system', 'user', 'assistant', 'tool')",
    ),
    "no role": (
        {"messages": [user("a"), {"content": "b"}]},
        "field 'messages'[1] has the role None; use one of ('system', 'user', 'assistant', 'tool')",
    ),
    "no content": (
        {"messages": [user("a"), {"role": "assistant"}]},
        "field 'messages'[1] must be {'role', 'content'} with text as content",
    ),
    "a user at the end": (
        {"messages": [user("a"), assistant("b"), user("c")]},
        "field 'messages' must end with an assistant's message after a user's",
    ),
    "an answer alone": (
        {"messages": [assistant("b")]},
        "field 'messages' must end with an assistant's message after a user's",
    ),
    "messages as text": ({"messages": "a"}, "field 'messages' must be a list of messages {'role', 'content'}"),
    "no messages": ({"messages": []}, "field 'messages' must be a list of messages {'role', 'content'}"),
    "completion as text": (
        {"prompt": [user("a")], "completion": "b"},
        "field 'completion' must be a list of messages {'role', 'content'}",
    ),
    "two completions": (
        {"prompt": [user("a")], "completion": [assistant("b"), assistant("c")]},
        "field 'completion' must be one assistant's message, as 'prompt' is a list",
    ),
    "not UTF-8": (b'{"prompt": "\xff"}\n', "not UTF-8 text (byte 13 is 0xff); save the file as UTF-8"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_row_is_refused_with_file_line_and_field(tmp_path, kind):
    row, reason = MALFORMED[kind]
    file = write(tmp_path, GOOD, GOOD, row)
    assert refusal(file) == f"{file}:3: {reason}"


def test_absurdly_nested_json_is_a_malformed_row(tmp_path):
    file = write(tmp_path, b"[" * 100_000)
    assert refusal(file).startswith(f"{file}:1: not valid JSON (maximum recursion depth")


@pytest.mark.parametrize("content", [b"", b"\n \n"], ids=["no bytes", "blank lines"])
def test_an_empty_file_is_refused(tmp_path, content):
    file = write(tmp_path, content)
    assert refusal(file) == f"data.train: {file} is empty; it must hold one object a row: {FORMATS}"


def test_a_file_that_is_not_there_is_refused(tmp_path):
    path = tmp_path / "none.jsonl"
    assert refusal(path) == (
        f"data.train: there is no file {str(path)!r}; give a file or folder (.jsonl, .jsonl.gz, .parquet, .arrow), or "
        "the hub id owner/name of a data set"
    )


def damaged(compressed: bytes, kind: str) -> bytes:
    middle = len(compressed) // 2
    return {
        "torn": compressed[:middle],
        "overwritten": compressed[:12] + b"\xff\xff\xff\xff" + compressed[16:],
        "a wrong checksum": compressed[:-8] + b"\0" * 8,
        "not gzip": b'{"prompt": "a", "completion": "b"}\n',
    }[kind]


@pytest.mark.parametrize("kind", ["torn", "overwritten", "a wrong checksum", "not gzip"])
def test_a_damaged_gz_file_is_refused(tmp_path, kind):
    whole = gzip.compress(b"".join(json.dumps(GOOD | {"n": n}).encode() + b"\n" for n in range(500)))
    file = write(tmp_path, damaged(whole, kind), name="rows.jsonl.gz")
    message = refusal(file)
    assert message.startswith(f"data.train: {file} cannot be read after line ")
    assert message.endswith("; copy it again")


# Holding out


def rows(count):
    return [Instruction((user(f"question {n}"),), f"answer {n}", f"f:{n}") for n in range(count)]


def test_held_out_rows_are_random_always_the_same_and_in_order():
    every = rows(40)
    rest, held_out = hold_out(every, 10, "data.num_held_out")
    assert (rest, held_out) == hold_out(every, 10, "data.num_held_out")
    assert [row for row in every if row in rest] == rest and [row for row in every if row in held_out] == held_out
    assert (len(rest), len(held_out)) == (30, 10) and not [row for row in rest if row in held_out]
    assert held_out != every[:10] and held_out != every[-10:]


@pytest.mark.parametrize("count", [3, 4])
def test_holding_out_everything_is_refused(count):
    with pytest.raises(InputError) as caught:
        hold_out(rows(3), count, "data.num_held_out")
    assert str(caught.value) == f"data.num_held_out={count} leaves nothing to train on: the file has 3 rows; lower it"


# Encoding


def ids(tokenizer, text):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_chat_prompt_ends_where_the_answer_begins(tokenizer):
    row = Instruction(
        ({"role": "system", "content": "Be nice."}, user("The cat?"), assistant("Yes."), user("Why?")),
        "It likes milk.",
        "f:1",
    )
    (example,), counts = encode([row], tokenizer, **OPTIONS)
    assert example.prompt == (
        "<|system|>Be nice.<|end|><|user|>The cat?<|end|><|assistant|>Yes.<|end|><|user|>Why?<|end|><|assistant|>"
    )
    assert example.prompt_ids == ids(tokenizer, example.prompt)
    assert example.completion_ids == (*ids(tokenizer, "It likes milk."), tokenizer.eos_token_id)
    assert (example.question, example.completion) == ("Why?", "It likes milk.")
    assert counts == EncodingCounts(1, len(example.completion_ids), 0, 0)


def test_a_plain_prompt_is_the_text_itself(tokenizer):
    row = Instruction((user("The cat likes"),), " milk.", "f:1")
    (example,), _ = encode([row], tokenizer, **OPTIONS | {"prompt_format": "plain"})
    assert example.prompt == "The cat likes"
    assert example.prompt_ids == ids(tokenizer, "The cat likes")
    assert example.completion_ids == (*ids(tokenizer, " milk."), tokenizer.eos_token_id)


def test_alpaca_writes_instruction_and_input_under_their_headings():
    tokenizer = make_tokenizer()
    rows = [
        Instruction((user("Sum up.\n\nThe cat."),), "Cat.", "f:1", "The cat.", ("Cat.", "A cat.")),
        Instruction((user("Why?"),), "So.", "f:2"),
    ]
    with_input, without = encode(rows, tokenizer, **OPTIONS | {"prompt_format": "alpaca", "max_prompt_tokens": 300,
                                                               "max_tokens": 400})[0]  # fmt: skip
    assert with_input.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nSum up.\n\n### Input:\nThe cat.\n\n"
        "### Response:\n"
    )
    assert without.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nWhy?\n\n### Response:\n"
    )
    assert tokenizer.decode(with_input.prompt_ids) == with_input.prompt
    assert (with_input.references, without.references) == (("Cat.", "A cat."), ())
    conversation = Instruction((user("a"), assistant("b"), user("c")), "d", "f:3")
    with pytest.raises(InputError, match=r"^f:3: a conversation needs data\.prompt_format=chat$"):
        encode([conversation], tokenizer, **OPTIONS | {"prompt_format": "alpaca"})


@pytest.mark.parametrize("prompt_format", ["chat", "plain"])
def test_prompt_and_completion_are_tokenised_apart(prompt_format):
    """Where a merge spans the border, generation would never see it."""
    tokenizer = make_tokenizer(corpus=["likesmilk likesmilk likesmilk"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    row = Instruction((user("likes"),), "milk", "f:1")
    (example,), _ = encode([row], tokenizer, **OPTIONS | {"prompt_format": prompt_format})
    assert len(ids(tokenizer, "likesmilk")) == 1
    assert example.prompt_ids == ids(tokenizer, "likes")
    assert example.completion_ids == (*ids(tokenizer, "milk"), tokenizer.eos_token_id)


@pytest.mark.parametrize(
    "after_the_answer",
    ["", "<|end|>", "<|end|>\n", "<|end|>\n<|end|>"],
    ids=["no end token", "one", "one and a line break", "two"],
)
def test_the_end_token_counts_once_and_nothing_after_it(after_the_answer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}"
        + after_the_answer
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (example,), counts = encode([Instruction((user("Why?"),), "So.", "f:1")], tokenizer, **OPTIONS)
    assert example.completion_ids == (*ids(tokenizer, "So."), tokenizer.eos_token_id)
    assert counts.num_tokens == len(example.completion_ids)


def test_a_long_completion_is_cut_with_its_end_token_and_counted(tokenizer):
    row = Instruction((user("The cat"),), "milk and rain", "f:1")
    options = OPTIONS | {"prompt_format": "plain"}
    (whole,), _ = encode([row], tokenizer, **options)
    length = len(whole.prompt_ids) + len(whole.completion_ids)
    (fitting,), counts = encode([row], tokenizer, **options | {"max_prompt_tokens": 4, "max_tokens": length})
    assert fitting == whole and counts.num_completions_cut == 0
    (cut,), counts = encode([row], tokenizer, **options | {"max_prompt_tokens": 4, "max_tokens": length - 1})
    assert cut.completion_ids == whole.completion_ids[:-1]
    assert tokenizer.eos_token_id not in cut.completion_ids
    assert counts == EncodingCounts(1, len(whole.completion_ids) - 1, 0, 1)


def test_a_long_prompt_is_refused_with_its_line(tokenizer):
    row = Instruction((user("The cat"),), "milk", "data.jsonl:7")
    length = len(ids(tokenizer, "<|user|>The cat<|end|><|assistant|>"))
    encode([row], tokenizer, **OPTIONS | {"max_prompt_tokens": length})
    with pytest.raises(InputError) as caught:
        encode([row], tokenizer, **OPTIONS | {"max_prompt_tokens": length - 1})
    assert str(caught.value) == (
        f"data.jsonl:7: the prompt is {length} tokens, data.max_prompt_tokens is {length - 1}; "
        "raise it, or set data.long_prompts=drop"
    )


def test_long_prompts_are_dropped_and_counted_and_ids_stay_without_gaps(tokenizer):
    short, long = Instruction((user("The cat"),), "milk", "f:1"), Instruction((user("The cat " * 9),), "sun", "f:2")
    options = OPTIONS | {"max_prompt_tokens": 10, "long_prompts": "drop"}
    examples, counts = encode([long, short, long, short], tokenizer, **options, first_id=5)
    assert [(example.example_id, example.completion) for example in examples] == [(5, "milk"), (6, "milk")]
    assert (counts.num_examples, counts.num_long_prompts_dropped) == (2, 2)
    with pytest.raises(InputError, match=r"^data: every prompt is longer than data\.max_prompt_tokens=10; raise it$"):
        encode([long], tokenizer, **options)


WRONG_FORMATS = {
    "no template": (None, "data.prompt_format=chat, but the tokenizer has no chat template; use plain"),
    "a template that refuses": (
        "{{ raise_exception('roles must alternate') }}",
        "f:1: the tokenizer's chat template refuses the conversation (roles must alternate); change the row, or use "
        "data.prompt_format=plain",
    ),
    "a template that does not go on": (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "f:1: the tokenizer's chat template does not continue its own generation prompt, so the completion cannot be "
        "told from the prompt; use data.prompt_format=plain",
    ),
    "a template that writes nothing": (
        "{% if messages | length > 1 %}{{ messages[1]['content'] }}{% endif %}",
        "f:1: the prompt has no tokens; give it some text",
    ),
}


@pytest.mark.parametrize("kind", WRONG_FORMATS)
def test_a_chat_template_that_does_not_fit_is_refused(kind):
    tokenizer = make_tokenizer()
    tokenizer.chat_template, message = WRONG_FORMATS[kind]
    with pytest.raises(InputError) as caught:
        encode([Instruction((user("Why?"),), "So.", "f:1")], tokenizer, **OPTIONS)
    assert str(caught.value) == message


def test_a_conversation_needs_the_chat_format(tokenizer):
    row = Instruction((user("a"), assistant("b"), user("c")), "d", "f:1")
    with pytest.raises(InputError, match=r"^f:1: a conversation needs data\.prompt_format=chat$"):
        encode([row], tokenizer, **OPTIONS | {"prompt_format": "plain"})
