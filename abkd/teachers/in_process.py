"""A frozen model in the same process as the student."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abkd.errors import InputError
from abkd.head import LMHead, check_head, check_packing, completion_hidden, completion_logits
from abkd.targets import DenseTargets, HiddenTargets, Targets


class InProcessTeacher:
    """Gives logits, or what stands for them, at the completion tokens of a batch; never trains, never keeps a graph.

    Args:
        model: a causal language model. It is frozen and put in evaluation mode, in place.
        remember: keep each example's last hidden states in main memory, num_tokens * hidden_size numbers,
            the first time it comes by, and apply only the head from then on. For several epochs, or for
            several students on one data set. Needs example ids that never change their meaning.
        pack: the model reads the examples of a batch end to end, without padding; see `completion_logits`.

    Raises:
        InputError: pack, and packed examples see each other in the model.
    """

    def __init__(self, model: PreTrainedModel, *, remember: bool = False, pack: bool = False):
        self.model = model.eval().requires_grad_(False)
        self.remember, self.pack = remember, pack
        if pack:
            check_packing(model)
        self._hidden: dict[int, Tensor] = {}  # example id -> [num_tokens, hidden]
        self._no_head: str | None = None  # why LMHead cannot be read, empty where it can; None until it is checked

    @torch.no_grad()
    def logits(self, *, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, example_ids: Tensor) -> Tensor:
        """`[N, vocab]`, the rows of `completion_logits`.

        Args:
            input_ids, attention_mask: `[batch, length]`.
            mask: bool `[batch, length - 1]`, True at (b, t) counts the prediction of token t + 1.
            example_ids: `[batch]`, what `remember` goes by.
        """
        inputs = self._on_device(input_ids=input_ids, attention_mask=attention_mask, mask=mask)
        if not self.remember:
            return completion_logits(self.model, **inputs, packed=self.pack)
        hidden = self._remembered(example_ids, **inputs)
        return LMHead.read(self.model).logits(hidden)

    @torch.no_grad()
    def targets(self, *, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, example_ids: Tensor) -> Targets:
        """Hidden states with the head where the head can be read, else logits. Arguments as `logits`."""
        inputs = self._on_device(input_ids=input_ids, attention_mask=attention_mask, mask=mask)
        if self.remember:
            return HiddenTargets(self._remembered(example_ids, **inputs), LMHead.read(self.model))
        try:
            self._check_head()
        except InputError:
            return DenseTargets(completion_logits(self.model, **inputs, packed=self.pack))
        hidden = completion_hidden(self.model, **inputs, packed=self.pack)
        return HiddenTargets(hidden, LMHead.read(self.model))

    def _on_device(self, **tensors: Tensor) -> dict[str, Tensor]:
        return {name: tensor.to(self.model.device) for name, tensor in tensors.items()}

    def _remembered(self, example_ids: Tensor, **inputs: Tensor) -> Tensor:
        """`[N, hidden]`, out of memory; what is not there yet is made."""
        ids = example_ids.tolist()
        if not all(example_id in self._hidden for example_id in ids):
            self._check_head()
            hidden = completion_hidden(self.model, **inputs, packed=self.pack)
            lengths = inputs["mask"].sum(dim=1).tolist()
            self._hidden.update(zip(ids, (rows.cpu().clone() for rows in hidden.split(lengths)), strict=True))
        return torch.cat([self._hidden[example_id] for example_id in ids]).to(self.model.device)

    def _check_head(self) -> None:
        if self._no_head is None:
            try:
                check_head(self.model)
                self._no_head = ""
            except InputError as error:
                self._no_head = str(error)
        if self._no_head:
            raise InputError(f"teacher: {self._no_head}, and teacher.remember=false")
