"""`generate_ids` by vLLM, in the same process: for rollouts, where the weights change every step, and for answers."""

import os
import random
from collections.abc import Callable, Iterable, Sequence
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abkd.generation import Sampling
from abkd.head import unwrapped

Weights = Iterable[tuple[str, Tensor]]


class VLLM:
    """Called as `abkd.generation.generate_ids`. vLLM holds a copy of the weights, and what the model has is sent to it.

    A completion is drawn under a seed of its own, that follows from `seed` and its place; which kernels ran, and beside
    which other prompts, can change it in the last digits and then in its words.

    Args:
        model: a causal language model of a family that vLLM knows; its configuration alone is read here.
        max_tokens: of a prompt and its completion together, at most.
        memory: above 0, below 1: the share of a GPU's memory that vLLM takes, for its copy of the weights and the
            key-value cache; on a CPU it takes what VLLM_CPU_KVCACHE_SPACE says.
        dtype: of vLLM's copy.
        is_fixed: the weights stay what they are at the first call, and are sent then alone.
        weights: model -> names and tensors, as in its checkpoint.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_tokens: int,
        memory: float = 0.3,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        is_fixed: bool = False,
        weights: Callable[[Any], Weights] = lambda model: unwrapped(model).state_dict().items(),
    ):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before the import: tensors are handed over as they are
        from vllm import LLM

        with TemporaryDirectory() as folder:
            unwrapped(model).config.save_pretrained(folder)
            self._llm = LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                max_model_len=max_tokens,
                gpu_memory_utilization=memory,
                dtype=dtype,
                enforce_eager=not torch.cuda.is_available(),  # compiling takes minutes on a CPU, and gains little
                enable_prefix_caching=False,  # it would outlive the weights
            )
        self._weights, self._is_fixed, self._is_sent = weights, is_fixed, False

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        end_id: int,
        batch_size: int = 0,
        seed: int = 0,
        progress: Callable[[int], object] = lambda num_done: None,
    ) -> list[list[int]]:
        """As `generate_ids`; `batch_size` is not used: vLLM makes its own batches."""
        from vllm import SamplingParams

        if not (self._is_fixed and self._is_sent):
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(self._weights(model))})
            self._is_sent = True
        dice = random.Random(seed)
        how = [
            SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=dice.getrandbits(31),
                stop_token_ids=[end_id],
                ignore_eos=True,  # what ends a completion is end_id, not what the checkpoint says
                detokenize=False,
            )
            for _ in prompt_ids
        ]
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        answers = self._llm.generate(prompts, how, use_tqdm=False)
        progress(len(prompts))
        return [list(answer.outputs[0].token_ids) for answer in answers]
