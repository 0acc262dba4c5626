"""A frozen model in the same process as the student."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abkd.errors import InputError
from abkd.head import completion_logits


class InProcessTeacher:
    """Gives the logits at the completion tokens of a batch; never trains, never keeps a graph.

    Args:
        model: a causal language model. It is frozen and put in evaluation mode, in place.
        remember: keep each example's last hidden states in main memory, num_tokens * hidden_size numbers,
            the first time it comes by, and apply only the head from then on. For several epochs, or for
            several students on one data set. Needs example ids that never change their meaning.
    """

    def __init__(self, model: PreTrainedModel, *, remember: bool = False):
        self.model = model.eval().requires_grad_(False)
        self.remember = remember
        self._hidden: dict[int, Tensor] = {}  # example id -> [num_tokens, hidden]
        self._head_is_plain = False

    @torch.no_grad()
    def logits(self, *, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, example_ids: Tensor) -> Tensor:
        """`[N, vocab]`, the rows of `completion_logits`.

        Args:
            input_ids, attention_mask: `[batch, length]`.
            mask: bool `[batch, length - 1]`, True at (b, t) counts the prediction of token t + 1.
            example_ids: `[batch]`, what `remember` goes by.
        """
        device = self.model.device
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "mask": mask}
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        if not self.remember:
            return completion_logits(self.model, **inputs)
        ids = example_ids.tolist()
        if not all(example_id in self._hidden for example_id in ids):
            hidden = self._last_hidden(**inputs)
            lengths = mask.sum(dim=1).tolist()
            self._hidden.update(zip(ids, (rows.cpu().clone() for rows in hidden.split(lengths)), strict=True))
        known = torch.cat([self._hidden[example_id] for example_id in ids])
        return self.model.get_output_embeddings()(known.to(device))

    def _last_hidden(self, *, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
        """`[N, hidden]`: what the output head receives at the counted tokens."""
        if not self._head_is_plain:
            self._check_head(input_ids[:1])
        body = self.model.base_model
        states = body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return states[:, :-1][mask]

    def _check_head(self, input_ids: Tensor) -> None:
        states = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        from_states = self.model.get_output_embeddings()(states)
        if not torch.allclose(from_states, self.model(input_ids=input_ids).logits, rtol=1e-3, atol=1e-3):
            raise InputError(
                "teacher.remember: this model changes its logits after the output layer "
                "(a soft-cap or a scale), which hidden states do not carry; set teacher.remember=false"
            )
        self._head_is_plain = True
