"""Sampling from a causal language model: token ids for rollouts, text for evaluation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from abkd.head import sharded, unwrapped


class Completion(NamedTuple):
    text: str
    finished: bool
    """False when it stopped at `max_new_tokens` and not at the end token."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    max_new_tokens: int
    """At most this many tokens each; a completion also ends at the end token."""
    temperature: float = 1.0
    """0 is greedy decoding; above 0 samples from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Above 0, at most 1: only the most probable tokens that together hold this mass are drawn from."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int], object] = lambda num_done: None,
) -> list[Completion]:
    """One completion per prompt, in order, without prompt and special tokens.

    Args:
        prompts: complete model inputs: a chat template, where there is one, has been applied already.
        max_new_tokens, temperature, top_p: see `Sampling`.
        seed: of the sampling; the caller's random state is left as it was.
        progress: called with the number of prompts of every finished batch.
    """
    if not prompts:
        return []
    prompt_ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    completions = generate_ids(
        model,
        prompt_ids,
        Sampling(max_new_tokens, temperature, top_p),
        end_id=tokenizer.eos_token_id,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return [
        Completion(text, ids[-1:] == [tokenizer.eos_token_id]) for text, ids in zip(texts, completions, strict=True)
    ]


@torch.no_grad()
def generate_ids(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    end_id: int,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int], object] = lambda num_done: None,
) -> list[list[int]]:
    """The new token ids after each prompt, in order. The last one is `end_id` where the model ended by itself.

    Args:
        prompt_ids: at least one token each; batches are of prompts of like length.
        seed, progress: as in `generate`.
    """
    model = unwrapped(model)  # whose decoding options are the ones that count
    completions: dict[int, list[int]] = {}
    shortest_first = sorted(range(len(prompt_ids)), key=lambda index: len(prompt_ids[index]))
    devices = [model.device] if model.device.type == "cuda" else []
    with _plain_decoding(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in range(0, len(prompt_ids), batch_size):
            indices = shortest_first[start : start + batch_size]
            batch = _generate_batch(model, [prompt_ids[index] for index in indices], sampling, end_id)
            completions.update(zip(indices, batch, strict=True))
            progress(len(indices))
    return [completions[index] for index in range(len(prompt_ids))]


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


def _generate_batch(
    model: PreTrainedModel, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, end_id: int
) -> list[list[int]]:
    width = max(map(len, prompt_ids))
    input_ids = torch.full((len(prompt_ids), width), end_id)  # [batch, width], padded on the left
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompt_ids):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    how = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": sampling.top_p}
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=end_id,
        pad_token_id=end_id,
        synced_gpus=bool(sharded(model)),  # every forward is one of all ranks, also when this one has finished
        **(how if sampling.temperature > 0 else {"do_sample": False}),
    )
    rows = output[:, width:].tolist()
    return [row[: row.index(end_id) + 1] if end_id in row else row for row in rows]
