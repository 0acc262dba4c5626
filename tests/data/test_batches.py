import pytest
import torch

from abkd.data.batches import Collator, LengthGroupedSampler, batches_by_length
from abkd.data.instructions import Example, Instruction, encode

PAD, END = 1, 0


def example(example_id, prompt_ids, completion_ids):
    return Example(example_id, tuple(prompt_ids), tuple(completion_ids), "", "", "")


def test_only_the_completion_is_labelled():
    batch = Collator(PAD)([example(7, [5, 6], [8, 9, END]), example(3, [5], [END]), example(4, [5, 6, 7], [8])])
    assert batch["input_ids"].tolist() == [[5, 6, 8, 9, END], [5, END, PAD, PAD, PAD], [5, 6, 7, 8, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert batch["labels"].tolist() == [
        [-100, -100, 8, 9, END],
        [-100, END, -100, -100, -100],
        [-100, -100, -100, 8, -100],
    ]
    assert batch["example_ids"].tolist() == [7, 3, 4]
    assert all(tensor.dtype == torch.long for tensor in batch.values())


def test_padding_with_the_end_token_labels_the_end_once():
    """Where a tokenizer has no padding token, END pads as well; only the completion's own END is learnt."""
    batch = Collator(END)([example(0, [5], [8, END]), example(1, [5, 6, 7], [8, 9, END])])
    assert batch["input_ids"].tolist()[0] == [5, 8, END, END, END, END]
    assert batch["labels"].tolist()[0] == [-100, 8, END, -100, -100, -100]


@pytest.mark.parametrize(("pad_token_id", "pads_with"), [(PAD, PAD), (None, END), (END, END)])
def test_the_padding_is_the_tokenizers_or_its_end_token(pad_token_id, pads_with):
    class Tokenizer:
        eos_token_id = END

    Tokenizer.pad_token_id = pad_token_id
    assert Collator.of(Tokenizer).pad_id == pads_with


def test_labels_of_real_rows_decode_to_the_completion_and_its_end_token(tokenizer):
    texts = [("Who likes milk?", "The cat."), ("What does the fox like?", "The fox likes rain and sun.")]
    rows = [Instruction(({"role": "user", "content": question},), answer, "f:1") for question, answer in texts]
    options = {"prompt_format": "chat", "max_prompt_tokens": 64, "max_tokens": 128, "long_prompts": "refuse"}
    examples, counts = encode(rows, tokenizer, **options)
    batch = Collator.of(tokenizer)(examples)
    counted = batch["labels"] != -100
    for index, (question, answer) in enumerate(texts):
        assert tokenizer.decode(batch["labels"][index][counted[index]]) == f"{answer}<|end|>"
        unpadded = batch["input_ids"][index][batch["attention_mask"][index].bool()]
        assert tokenizer.decode(unpadded) == f"<|user|>{question}<|end|><|assistant|>{answer}<|end|>"
    assert torch.equal(batch["labels"][counted], batch["input_ids"][counted])
    assert counted.sum() == counts.num_tokens


def test_evaluation_batches_hold_every_example_once_like_lengths_together():
    lengths = [(9, 1), (2, 3), (1, 1), (4, 4), (3, 2), (1, 9), (2, 2)]
    examples = [example(index, [5] * prompt, [6] * completion) for index, (prompt, completion) in enumerate(lengths)]
    batches = list(batches_by_length(examples, Collator(PAD), batch_size=3))
    assert [batch["example_ids"].tolist() for batch in batches] == [[2, 6, 1], [4, 3, 0], [5]]
    assert [batch["input_ids"].shape[1] for batch in batches] == [5, 10, 10]


def test_the_grouped_order_has_every_index_once_and_goes_by_seed_and_epoch():
    lengths = [index % 13 + 1 for index in range(100)]

    def order(seed, epoch=0):
        sampler = LengthGroupedSampler(lengths, batch_size=4, seed=seed)
        sampler.set_epoch(epoch)
        assert len(sampler) == 100
        return list(sampler)

    assert sorted(order(1)) == list(range(100))
    assert order(1) == order(1) and order(1, epoch=2) == order(1, epoch=2)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_the_grouped_order_puts_like_lengths_into_one_batch():
    lengths = torch.randperm(400).tolist()
    order = list(LengthGroupedSampler(lengths, batch_size=4, seed=0))
    spreads = [max(batch) - min(batch) for batch in torch.tensor(lengths)[order].split(4)]
    assert sum(spreads) / len(spreads) < 20  # 240 where lengths play no part
    means = [sum(batch) / 4 for batch in torch.tensor(lengths)[order].split(4)]
    assert means != sorted(means) and means != sorted(means, reverse=True)
