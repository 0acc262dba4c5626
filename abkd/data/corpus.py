"""A corpus of plain text for the language-modelling term: documents -> blocks of tokens of one length."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from abkd.data.sources import read_lines
from abkd.errors import InputError


class Corpus:
    """Blocks of tokens, in an order that follows the seed; every pass over them has another one.

    Args:
        blocks: `[num_blocks, block_tokens]`, at least one.
    """

    def __init__(self, blocks: Tensor, seed: int):
        self.blocks, self.seed = blocks, seed

    def rows(self, first: int, count: int) -> Tensor:
        """`[count, block_tokens]`: the blocks at places `first`, `first + 1`, ... of the endless order.

        A place alone says which block it is, so that ranks and resumed runs need no state.
        """
        return self.blocks[[self._index(place) for place in range(first, first + count)]]

    def _index(self, place: int) -> int:
        turn, offset = divmod(place, len(self.blocks))
        if getattr(self, "_turn", None) != turn:
            self._turn, self._order = turn, list(range(len(self.blocks)))
            random.Random(f"{self.seed}/{turn}").shuffle(self._order)
        return self._order[offset]


def read_blocks(path: Path, field: str, tokenizer: Any, block_tokens: int, max_blocks: int) -> tuple[Tensor, int]:
    """(blocks `[num_blocks, block_tokens]`, tokens left over at the end).

    Documents, each followed by the end token, are joined and cut into blocks: a block may hold pieces of several, which
    attend to each other, as in the pre-training of most models. A last short block is left out.

    Args:
        path: a text file (`.txt`, `.txt.gz`: one document) or JSONL with a field `text` (a row is a document).
        max_blocks: reading stops there; 0 for all.

    Raises:
        InputError: the corpus is missing, malformed or shorter than a block.
    """
    blocks: list[Tensor] = []
    left: list[int] = []
    with tqdm(desc="corpus", unit="block", total=max_blocks or None, leave=False) as bar:
        for text in _pieces(path, field):
            left += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
            left += [] if text else [tokenizer.eos_token_id]
            whole = len(left) // block_tokens
            if max_blocks:
                whole = min(whole, max_blocks - len(blocks))
            blocks += torch.tensor(left[: whole * block_tokens], dtype=torch.long).view(whole, block_tokens).unbind()
            left = left[whole * block_tokens :]
            bar.update(whole)
            if len(blocks) == max_blocks > 0:
                return torch.stack(blocks), 0
    if not blocks:
        raise InputError(
            f"{field}: {path} has {len(left):,} tokens, less than a block of data.corpus_tokens={block_tokens:,}; "
            "lower it, or give a longer corpus"
        )
    return torch.stack(blocks), len(left)


def _pieces(path: Path, field: str) -> Iterator[str]:
    """The documents in pieces of some paragraphs, which are tokenised apart; "" after each document."""
    for document in _documents(path, field):
        piece: list[str] = []
        length = 0
        for line in document.splitlines(keepends=True):
            piece.append(line)
            length += len(line)
            if length > 100_000 and not line.strip():
                yield "".join(piece)
                piece, length = [], 0
        if piece:
            yield "".join(piece)
        yield ""


def _documents(path: Path, field: str) -> Iterator[str]:
    if not path.is_file():
        raise InputError(f"{field}: there is no file {str(path)!r}; give a text or JSONL file")
    lines = read_lines(path, field)
    if ".jsonl" not in path.suffixes:
        yield "\n".join(line for _, line in lines)
        return
    for number, line in lines:
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{path}:{number}: needs a JSON object with the field 'text'") from None
        if not isinstance(text, str):
            raise InputError(f"{path}:{number}: field 'text' must be text, is {type(text).__name__}")
        yield text
