"""Distillation of language models: the loss at the tokens of completions, with rollouts and a corpus."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from abkd.data.batches import Collator, LengthGroupedSampler, batches_by_length, num_tokens
from abkd.data.corpus import Corpus
from abkd.data.instructions import Example
from abkd.data.rollouts import SAMPLED_ID, Adaptive, Rollouts, roll_out
from abkd.errors import InputError
from abkd.evaluation.fidelity import fidelity
from abkd.head import LMHead, check_head, check_packing, completion_hidden, completion_logits
from abkd.objective import Objective, completion_mask
from abkd.targets import DenseTargets, HiddenTargets, Targets
from abkd.teachers.teacher import Teacher
from abkd.trainer.loop import VALIDATION_DIVERGENCES, AbstractDistillationTrainer


class DistillationTrainer(AbstractDistillationTrainer):
    """Trains `model`, the student, towards `teacher` under `objective`.

    Args:
        model: a causal language model; what is to stay fixed has `requires_grad=False`.
        teacher: gives targets at the completion tokens; not trained, not saved. None where kd_weight is 0.
        objective: calibration and divergence, weights.
        train_examples, validation_examples: tokenised instructions.
        tokenizer: pads the batches, and is saved beside the student.
        group_by_length: batches of examples of like length.
        pack: the student reads the examples of a micro-batch end to end, without padding and without seeing each
            other; the loss stays the same. A teacher has its own `pack`.
        corpus, lm_weight: lm_weight times the mean next-token loss of the student over the corpus's tokens of the step
            is added; a micro-batch takes as many blocks as its batch size. Both or neither.
        rollouts: samples the completions of some steps, see `abkd.data.rollouts`; None trains on the data's alone. Of a
            sampled completion the divergence counts, and no cross-entropy: there is no right answer to it.
        logits: "dense" makes all logits of a batch; "fused" makes them chunk by chunk (`abkd.kernels`), which
            takes a plain calibration and a head that `LMHead` represents; "auto" is fused where that is so.
            `how_logits` says in one line which it is and why.

    The gradient of an optimiser step is that of the mean over all its counted tokens, however they are
    spread over micro-batches and ranks. Logs what docs/metrics.md lists. A loss that is not finite stops the training
    with a message.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: TrainingArguments,
        teacher: Teacher | None,
        objective: Objective,
        train_examples: Sequence[Example],
        validation_examples: Sequence[Example],
        tokenizer: Any,
        callbacks: Sequence[TrainerCallback] = (),
        group_by_length: bool = False,
        pack: bool = False,
        rollouts: Rollouts | None = None,
        corpus: Corpus | None = None,
        lm_weight: float = 0.0,
        logits: Literal["auto", "fused", "dense"] = "auto",
    ):
        if (corpus is None) != (lm_weight == 0):
            raise InputError(f"lm_weight={lm_weight:g} and a corpus go together; give both, or neither")
        super().__init__(
            model=model,
            args=args,
            objective=objective,
            has_teacher=teacher is not None,
            train_examples=list(train_examples),
            validation_examples=list(validation_examples),
            collator=Collator.of(tokenizer),
            tokenizer=tokenizer,
            callbacks=callbacks,
        )
        self.teacher = teacher
        self.group_by_length, self.pack = group_by_length, pack
        if pack:
            check_packing(self.model)
        self.rollouts, self.corpus, self.lm_weight = rollouts, corpus, lm_weight
        self._micro_batch, self._num_micro_batches = 0, args.gradient_accumulation_steps
        self.fused, self.how_logits = _choose_logits(self.model, objective, logits)

    def loss_of(
        self, model: nn.Module, inputs: dict[str, Tensor], objective: Objective, count: Tensor | int | None
    ) -> Tensor:
        labels, example_ids = inputs["labels"], inputs["example_ids"]
        mask = completion_mask(labels)
        batch: dict[str, Any] = {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"mask": mask}
        if (example_ids == SAMPLED_ID).all():
            objective = replace(objective, ce_weight=0.0)
        counted: dict[str, Any] = {
            "labels": labels[:, 1:][mask],
            "num_tokens": mask.sum() if count is None else count,
        }
        teacher = self.teacher if objective.kd_weight > 0 else None
        teach = {**batch, "example_ids": example_ids}
        targets: Targets | None
        if self.fused:
            targets = teacher.targets(**teach) if teacher else None
            hidden = completion_hidden(model, **batch, packed=self.pack)
            if hidden.dtype == torch.float16:  # the kernel takes its gradient before the loss is scaled
                hidden = hidden.float()
            head = LMHead.read(model)  # after the forward: a wrapper may have put another weight there
            rows: Targets = HiddenTargets(hidden.detach(), head)
            loss = objective.linear(student_hidden=hidden, student_head=head, targets=targets, **counted)
        else:
            teacher_logits = teacher.logits(**teach).to(labels.device) if teacher else None
            targets = DenseTargets(teacher_logits) if isinstance(teacher_logits, Tensor) else teacher_logits
            logits = completion_logits(model, **batch, packed=self.pack)
            rows = DenseTargets(logits.detach())
            loss = objective(student_logits=logits, teacher_logits=teacher_logits, **counted)
        if self._look_at_rows:
            self._look_at_rows = False
            self._log.add_rows(rows, targets, counted["labels"], self.state.global_step, self.step_of(objective))
        total = loss.total
        if self.corpus is not None and model.training:
            total = total + self._lm_term(model)
        self._log.add(loss, mask, batch["attention_mask"])
        return total

    def _lm_term(self, model: nn.Module) -> Tensor:
        """lm_weight * this micro-batch's part of the step's mean next-token loss on the corpus."""
        assert self.corpus is not None
        size, ranks = self.args.per_device_train_batch_size, self.accelerator.num_processes
        micro_batch = self.state.global_step * self.args.gradient_accumulation_steps + self._micro_batch
        self._micro_batch += 1
        first = (micro_batch * ranks + self.args.process_index) * size
        ids = self.corpus.rows(first, size).to(self.args.device)
        ones = torch.ones_like(ids)
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": ones, "mask": ones[:, 1:].bool()}
        labels = ids[:, 1:].flatten()
        counted = {"labels": labels, "num_tokens": len(labels) * self._num_micro_batches * ranks}
        language = Objective(kd_weight=0.0, ce_weight=self.lm_weight)
        if self.fused:
            hidden = completion_hidden(model, **batch)
            loss = language.linear(student_hidden=hidden, student_head=LMHead.read(model), targets=None, **counted)
        else:
            loss = language(student_logits=completion_logits(model, **batch), teacher_logits=None, **counted)
        self._log.add_lm(loss, len(labels))
        return loss.total

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one step and its count of tokens, of the data or rolled out."""
        batches, num_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batch, self._num_micro_batches = 0, len(batches)
        if self.rollouts is None or not batches:
            return batches, num_tokens

        def seed(purpose: str) -> str:
            rank = self.args.process_index if purpose == "sampling" else "all"
            return f"{self.args.seed}/{self.state.global_step}/{purpose}/{rank}"

        with self.compute_loss_context_manager():
            rolled_out = roll_out(
                self.rollouts,
                batches,
                self.model,
                self.data_collator,
                end_id=self.processing_class.eos_token_id,
                progress=self._progress(),
                seed=seed,
            )
        return rolled_out, self._get_num_items_in_batch(rolled_out, device)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.group_by_length:
            return super()._get_train_sampler(train_dataset)
        step_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler([num_tokens(example) for example in self.train_dataset], step_size, self.args.seed)

    def measure(self, examples: Sequence[Example]) -> dict[str, float]:
        """`fidelity` to the teacher, if any."""
        batches = batches_by_length(examples, self.data_collator, self.args.per_device_eval_batch_size)
        teacher_targets = None if self.teacher is None else self.teacher.targets
        measured = fidelity(self.model, teacher_targets, batches, VALIDATION_DIVERGENCES)
        if self.rollouts is not None:
            self.rollouts.validated(measured["next_token_loss"])
        return measured

    def figures(self, sums: dict[str, float], seconds: float) -> dict[str, float]:
        line = super().figures(sums, seconds)
        return line if self.rollouts is None else line | self._rollout_logs(self.rollouts)

    def _rollout_logs(self, rollouts: Rollouts) -> dict[str, float]:
        """Of this rank since the last line: how much was sampled, how long it was, how much of it came to an end."""
        drawn, rollouts.drawn = rollouts.drawn, []
        logs: dict[str, float] = {"num_sampled": len(drawn)}
        if drawn:
            end_id = self.processing_class.eos_token_id
            logs["sampled_tokens"] = sum(len(example.completion_ids) for example in drawn) / len(drawn)
            logs["sampled_ended"] = sum(example.completion_ids[-1] == end_id for example in drawn) / len(drawn)
        return logs | ({"threshold": rollouts.threshold} if isinstance(rollouts, Adaptive) else {})

    def save_extra(self, folder: Path) -> None:
        if self.rollouts is not None:
            self._rollouts_file(folder).write_text(json.dumps(self.rollouts.state()), encoding="utf-8")

    def load_extra(self, folder: Path) -> None:
        if self.rollouts is not None:
            self.rollouts.restore(json.loads(self._rollouts_file(folder).read_text(encoding="utf-8")))

    def _rollouts_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"rollouts_{self.args.process_index}.json"


def _choose_logits(model: nn.Module, objective: Objective, logits: str) -> tuple[bool, str]:
    """Whether the fused path is asked for and possible, and one line that says what was chosen."""
    if logits == "dense":
        return False, "logits: dense, as asked for"
    if reason := objective.needs_logits:
        if logits == "fused":
            raise InputError(f"training.logits=fused cannot do {reason}; set training.logits=auto")
        return False, f"logits: dense, because of {reason}"
    try:
        check_head(model)
        return True, "logits: fused with the divergence, chunk by chunk"
    except InputError as error:
        if logits == "fused":
            raise InputError(f"training.logits: {error}") from None
        return False, f"logits: dense, because {error}"
