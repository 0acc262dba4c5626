"""Whose completions a step trains on: the data's, or what the student writes to the same prompts.

Four strategies, those of the ABKD paper's Table 8: fixed data (`None` to the trainer), `OnPolicy`, `Mixed` (GKD,
Agarwal et al., ICLR 2024) and `Adaptive` (DistiLLM, Ko et al., ICML 2024). Sampled completions become batches through
the same `Collator` as the data's, so that a text has the same loss wherever it comes from.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from abkd.data.batches import Collator
from abkd.data.instructions import Example
from abkd.generation import Sampling, generate_ids
from abkd.objective import IGNORED_LABEL

Batch = dict[str, Tensor]
SAMPLED_ID = -1
"""The example id of a sampled text: it is no row of the data."""


@dataclass
class OnPolicy:
    """Every step trains on fresh completions of the student."""

    kind: ClassVar[str] = "on_policy"
    sampling: Sampling
    generate: Callable[..., list[list[int]]] = field(default=generate_ids, repr=False, kw_only=True)
    """`generate_ids`, or what takes its place: `abkd.generation_vllm.VLLM`."""
    drawn: list[Example] = field(default_factory=list, repr=False, init=False)
    """What has been sampled since it was last cleared, for the log."""

    def choose(self, dice: float, progress: float) -> str:
        """`data`, `fresh` or `buffer`: what a step trains on.

        Args:
            dice: uniform in [0, 1), one number per optimiser step and the same on every rank.
            progress: of the training, 0 to 1.
        """
        return "fresh"

    def keep(self, examples: Sequence[Example]) -> None:
        """Takes note of fresh completions."""

    def recall(self, count: int, dice: random.Random) -> list[Example]:
        """`count` earlier completions."""
        raise NotImplementedError(f"{self.kind} has no buffer")

    def validated(self, loss: float) -> None:
        """Takes note of a validation loss, nats per token."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this rank; JSON."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """From what `state` gave."""


@dataclass
class Mixed(OnPolicy):
    """A step trains on fresh completions with probability `share`, otherwise on the data's: GKD's lambda.

    Source: Agarwal et al., "On-Policy Distillation of Language Models", ICLR 2024, Algorithm 1.
    """

    kind: ClassVar[str] = "mixed"
    share: float = 0.5

    def choose(self, dice: float, progress: float) -> str:
        return "fresh" if dice < self.share else "data"


@dataclass
class Adaptive(OnPolicy):
    """Adaptive off-policy: sampled completions with probability `threshold`, more and more of them out of a buffer.

    With the threshold φ and t the progress, a step trains on fresh completions with probability φ(1 - t), or φ while
    the buffer is not full; on earlier ones out of the buffer with what is left of φ; on the data with 1 - φ.
    After a validation whose loss is `tolerance` or more above the reference, φ rises by `increase` (to 1 at most) and
    that loss becomes the reference; the first validation's loss is the first reference.

    Source: Ko et al., "DistiLLM", ICML 2024, section 3.2, with the decreasing replay schedule.
    """

    kind: ClassVar[str] = "adaptive"
    threshold: float = 0.0
    increase: float = 0.1
    tolerance: float = 0.1
    """nats per token"""
    capacity: int = 1000
    """Of the buffer, in completions per rank; the oldest give way."""
    reference: float | None = None

    def __post_init__(self):
        self.buffer: deque[Example] = deque(maxlen=self.capacity)

    def choose(self, dice: float, progress: float) -> str:
        if dice >= self.threshold:
            return "data"
        is_full = len(self.buffer) == self.capacity
        return "buffer" if is_full and dice >= self.threshold * (1 - progress) else "fresh"

    def keep(self, examples: Sequence[Example]) -> None:
        self.buffer.extend(examples)

    def recall(self, count: int, dice: random.Random) -> list[Example]:
        return dice.choices(self.buffer, k=count)

    def validated(self, loss: float) -> None:
        if self.reference is None:
            self.reference = loss
        elif loss >= self.reference + self.tolerance:
            self.threshold, self.reference = min(1.0, self.threshold + self.increase), loss

    def state(self) -> dict[str, Any]:
        rows = [[example.prompt_ids, example.completion_ids] for example in self.buffer]
        return {"threshold": self.threshold, "reference": self.reference, "buffer": rows}

    def restore(self, state: dict[str, Any]) -> None:
        self.threshold, self.reference = state["threshold"], state["reference"]
        self.buffer = deque((_sampled(*row) for row in state["buffer"]), maxlen=self.capacity)


Rollouts = OnPolicy
"""The common type of the strategies that sample."""
STRATEGIES: dict[str, type[OnPolicy]] = {kind.kind: kind for kind in (OnPolicy, Mixed, Adaptive)}


def roll_out(
    strategy: Rollouts,
    batches: Sequence[Batch],
    model: PreTrainedModel,
    collator: Collator,
    *,
    end_id: int,
    progress: float,
    seed: Callable[[str], str],
) -> list[Batch]:
    """The micro-batches that one optimiser step trains on, in the place of those of the data.

    Args:
        batches: of the data, as `collator` makes them; their prompts are answered.
        seed: purpose -> text that stands for run and step, and for `"sampling"` also for the rank: nothing is drawn
            from the global random state, so a resumed run draws the same.

    Returns:
        `batches` themselves where the step trains on the data.
    """
    choice = strategy.choose(random.Random(seed("choice")).random(), progress)
    if choice == "data":
        return list(batches)
    dice = random.Random(seed("sampling"))
    made = []
    for batch in batches:
        prompts = _prompts(batch)
        if choice == "buffer":
            examples = strategy.recall(len(prompts), dice)
        else:
            size = len(prompts)
            completions = strategy.generate(
                model, prompts, strategy.sampling, end_id=end_id, batch_size=size, seed=dice.getrandbits(63)
            )
            examples = [_sampled(*row) for row in zip(prompts, completions, strict=True)]
            strategy.keep(examples)
        strategy.drawn.extend(examples)
        made.append({name: tensor.to(batch["labels"].device) for name, tensor in collator(examples).items()})
    return made


def _prompts(batch: Batch) -> list[list[int]]:
    """The tokens before the first counted one, without padding."""
    counts = (batch["labels"] != IGNORED_LABEL) | (batch["attention_mask"] == 0)
    lengths = counts.long().argmax(dim=1).tolist()  # of the first True: a completion has at least one token
    return [row[:length] for row, length in zip(batch["input_ids"].tolist(), lengths, strict=True)]


def _sampled(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> Example:
    return Example(SAMPLED_ID, tuple(prompt_ids), tuple(completion_ids), "", "", "")
