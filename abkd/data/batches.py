"""Examples -> padded tensors. The only place where a label of -100 is written."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_pt_utils import get_length_grouped_indices

from abkd.data.instructions import Example
from abkd.objective import IGNORED_LABEL
from abkd.ranks import num_ranks, rank


class Collator:
    """Pads on the right to the longest example of the batch.

    Returns `input_ids`, `attention_mask`, `labels` (the completion's tokens; -100 elsewhere), all
    `[batch, length]`, and `example_ids` `[batch]`.
    """

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    @classmethod
    def of(cls, tokenizer: Any) -> "Collator":
        """Pads with the tokenizer's padding token, or with its end token where it has none."""
        return cls(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        rows = [example.prompt_ids + example.completion_ids for example in examples]
        shape = len(rows), max(map(len, rows))
        input_ids = torch.full(shape, self.pad_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED_LABEL)
        for index, (row, example) in enumerate(zip(rows, examples, strict=True)):
            input_ids[index, : len(row)] = torch.tensor(row)
            attention_mask[index, : len(row)] = 1
            labels[index, len(example.prompt_ids) : len(row)] = torch.tensor(example.completion_ids)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "example_ids": torch.tensor([example.example_id for example in examples]),
        }


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
    """A random order in which examples of like length stand together; another one each epoch, the same for a seed.

    Args:
        lengths: of every example, tokens.
        batch_size: examples per optimiser step: the size of the groups.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed = list(lengths), batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, also after a resume."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))

    def __len__(self) -> int:
        return len(self.lengths)


def batches_by_length(examples: Sequence[Example], collator: Collator, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Every example once, those of like length together, for evaluation.

    Of several ranks each gets its part, and as many batches as the others, of one example without a counted token where
    none is left for it.
    """
    ordered = sorted(examples, key=num_tokens)
    size = batch_size * num_ranks()
    for start in range(0, len(ordered), size):
        batch = ordered[start : start + size]
        if mine := batch[rank() :: num_ranks()]:
            yield collator(mine)
        else:
            idle = collator(batch[:1])
            yield idle | {"labels": torch.full_like(idle["labels"], IGNORED_LABEL)}


def num_batches(examples: Sequence[Example], batch_size: int) -> int:
    """That `batches_by_length` gives to each rank."""
    return -(-len(examples) // (batch_size * num_ranks()))


def num_tokens(example: Example) -> int:
    """Length of the example, prompt and completion."""
    return len(example.prompt_ids) + len(example.completion_ids)
