"""Sampling text from a causal language model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


class Completion(NamedTuple):
    text: str
    finished: bool
    """False when it stopped at `max_new_tokens` and not at the end token."""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int], object] = lambda num_done: None,
) -> list[Completion]:
    """One completion per prompt, in order, without prompt and special tokens.

    Args:
        prompts: complete model inputs: a chat template, where there is one, has been applied already.
        max_new_tokens: at most this many tokens each; a completion also ends at the tokenizer's end token.
        temperature: 0 is greedy decoding; above 0 samples from softmax(logits / temperature).
        seed: of the sampling; the caller's random state is left as it was.
        progress: called with the number of prompts of every finished batch.
    """
    completions: dict[int, Completion] = {}
    shortest_first = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    devices = [model.device] if model.device.type == "cuda" else []
    with _plain_decoding(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            indices = shortest_first[start : start + batch_size]
            batch = _generate_batch(model, tokenizer, [prompts[i] for i in indices], max_new_tokens, temperature)
            completions.update(zip(indices, batch, strict=True))
            progress(len(indices))
    return [completions[index] for index in range(len(prompts))]


@contextmanager
def _plain_decoding(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and none of the checkpoint's own decoding options, such as a repetition penalty."""
    was_training, own_options = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.train(was_training)
        model.generation_config = own_options


def _generate_batch(model, tokenizer, prompts: list[str], max_new_tokens: int, temperature: float) -> list[Completion]:
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    width = max(map(len, encoded))
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    input_ids = torch.full((len(prompts), width), pad_id)  # [batch, width], padded on the left
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(encoded):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_id,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    new_ids = output[:, width:]
    texts = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
    finished = (new_ids == tokenizer.eos_token_id).any(dim=1).tolist()
    return [Completion(text, end) for text, end in zip(texts, finished, strict=True)]
