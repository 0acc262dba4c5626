"""What every teacher of a language model does."""

import abc
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abkd.targets import Targets, TopKTargets


class Teacher(abc.ABC):
    """Gives targets at the completion tokens of a batch; never trains, never keeps a graph."""

    model: PreTrainedModel | None = None
    """Where it is a model in this process: it can be measured, and answer prompts."""

    @property
    def parts(self) -> tuple["Teacher", ...]:
        """The teachers of a mixture; else itself."""
        return (self,)

    @property
    @abc.abstractmethod
    def vocab(self) -> int:
        """Classes of a row."""

    @property
    def num_classes(self) -> int | None:
        """At most, that its rows are known at; None where they are whole."""
        return None

    @property
    def approximation(self) -> str:
        """How its rows are known, in a few words; empty where they are whole."""
        return ""

    @abc.abstractmethod
    def narrow(self, vocab: int) -> None:
        """Leaves out the classes from `vocab` on, as if their logits were -inf; in place."""

    @abc.abstractmethod
    def targets(self, *, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, example_ids: Tensor) -> Targets:
        """Of the N tokens that count, example by example, in the order of `completion_logits`.

        Args:
            input_ids, attention_mask: `[batch, length]`.
            mask: bool `[batch, length - 1]`, True at (b, t) counts the prediction of token t + 1.
            example_ids: `[batch]`, for a teacher that knows the examples.
        """

    @torch.no_grad()
    def logits(self, **batch: Any) -> Tensor | TopKTargets:
        """`[N, vocab]`, or what there is of it; arguments as `targets`."""
        targets = self.targets(**batch)
        return targets if isinstance(targets, TopKTargets) else targets.logits(0, targets.shape[0])
