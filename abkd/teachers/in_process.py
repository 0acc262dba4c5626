"""A frozen model in the same process as the student."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abkd.errors import InputError
from abkd.head import LMHead, check_head, check_packing, completion_hidden, completion_logits
from abkd.targets import DenseTargets, HiddenTargets, Targets
from abkd.teachers.teacher import Teacher


class InProcessTeacher(Teacher):
    """A model that reads each batch.

    Args:
        model: a causal language model. It is frozen and put in evaluation mode, in place.
        remember: keep each example's last hidden states in main memory, num_tokens * hidden_size numbers,
            the first time it comes by, and apply only the head from then on. For several epochs, or for
            several students on one data set. Needs example ids that never change their meaning.
        pack: the model reads the examples of a batch end to end, without padding; see `completion_logits`.

    Raises:
        InputError: pack, and packed examples see each other in the model.
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel, *, remember: bool = False, pack: bool = False):
        self.model = model.eval().requires_grad_(False)
        self.remember, self.pack = remember, pack
        if pack:
            check_packing(model)
        self._hidden: dict[int, Tensor] = {}  # example id -> [num_tokens, hidden]
        self._no_head: str | None = None  # why LMHead cannot be read, empty where it can; None until it is checked

    @property
    def vocab(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    def narrow(self, vocab: int) -> None:
        self.model.resize_token_embeddings(vocab)

    @torch.no_grad()
    def logits(self, **batch: Any) -> Tensor:
        """`[N, vocab]`, the rows of `completion_logits`; arguments as `targets`."""
        example_ids = batch.pop("example_ids")
        inputs = self._on_device(**batch)
        if not self.remember:
            return completion_logits(self.model, **inputs, packed=self.pack)
        return LMHead.read(self.model).logits(self._remembered(example_ids, **inputs))

    @torch.no_grad()
    def targets(self, *, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, example_ids: Tensor) -> Targets:
        """Hidden states with the head where the head can be read, else logits.

        Args:
            example_ids: `[batch]`, what `remember` goes by.
        """
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
