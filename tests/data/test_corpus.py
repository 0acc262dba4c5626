import gzip
import json

import pytest
import torch

from abkd import InputError
from abkd.data.corpus import Corpus, read_blocks

TEXTS = ["The cat likes milk.", "The dog likes rain.\nAnd the sun.", "x"]


def ids_of(tokenizer, texts):
    return [index for text in texts for index in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]


@pytest.mark.parametrize("gzipped", [False, True])
def test_documents_are_joined_by_the_end_token_and_cut(tokenizer, tmp_path, gzipped):
    content = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    file = tmp_path / ("c.jsonl.gz" if gzipped else "c.jsonl")
    file.write_bytes(gzip.compress(content) if gzipped else content)
    expected = ids_of(tokenizer, TEXTS)
    blocks, left = read_blocks(file, "data.corpus", tokenizer, 5, 0)
    assert blocks.flatten().tolist() == expected[: len(expected) // 5 * 5] and left == len(expected) % 5
    some, left = read_blocks(file, "data.corpus", tokenizer, 5, 2)
    assert torch.equal(some, blocks[:2]) and left == 0


def test_a_text_file_is_one_document(tokenizer, tmp_path):
    file = tmp_path / "c.txt"
    file.write_text("The cat\n\nlikes rain\n" * 50, encoding="utf-8")
    blocks, left = read_blocks(file, "data.corpus", tokenizer, 7, 0)
    everything = blocks.flatten().tolist()
    assert (
        tokenizer.decode(everything).startswith("The cat\n\nlikes rain\nThe cat")
        and tokenizer.eos_token_id not in everything[:-1]
    )
    assert len(everything) + left == len(ids_of(tokenizer, [file.read_text().rstrip("\n")]))


def test_every_pass_holds_every_block_in_another_order():
    corpus = Corpus(torch.arange(10).view(10, 1), seed=1)
    turns = [corpus.rows(10 * turn, 10).flatten().tolist() for turn in range(3)]
    assert all(sorted(turn) == list(range(10)) for turn in turns) and turns[0] != turns[1] != turns[2]
    assert corpus.rows(7, 6).flatten().tolist() == turns[0][7:] + turns[1][:3]
    assert corpus.rows(0, 10).flatten().tolist() == turns[0]
    assert Corpus(corpus.blocks, seed=2).rows(0, 10).flatten().tolist() != turns[0]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("c.txt", "a", "has 2 tokens, less than a block of data.corpus_tokens=64; lower it"),
        ("c.jsonl", '{"text": 3}', r":1: field 'text' must be text, is int"),
        ("c.jsonl", '{"text": "a"}\n\n{"txt": 3}', r":3: needs a JSON object with the field 'text'"),
        ("c.jsonl", "[", r":1: needs a JSON object with the field 'text'"),
        ("c.txt", b"\xff\xfe", ":1: not UTF-8 text"),
        ("c.jsonl.gz", "no gzip", "cannot be read after line 0"),
    ],
)
def test_a_malformed_corpus_is_refused_with_its_place(tokenizer, tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        read_blocks(file, "data.corpus", tokenizer, 64, 0)


def test_a_missing_corpus_is_refused(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"data\.corpus: there is no file"):
        read_blocks(tmp_path / "none.txt", "data.corpus", tokenizer, 64, 0)
