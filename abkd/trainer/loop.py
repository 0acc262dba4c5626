"""The Hugging Face Trainer with a teacher: another loss, another evaluation, checkpoints that are marked whole."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments

from abkd.analysis.movement import mass_scalars
from abkd.calibrations import DivergenceCalibration
from abkd.divergences import AlphaBeta, AlphaBetaSchedule, Divergence, ForwardKL, ReverseKL
from abkd.errors import InputError
from abkd.log import StepLog, figures
from abkd.objective import Objective
from abkd.ranks import summed
from abkd.rundir import WHOLE_MARK

VALIDATION_DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "alpha_beta": AlphaBeta(),
}


class AbstractDistillationTrainer(Trainer):
    """What does not depend on the task: schedules, log, best checkpoint, checkpoints marked whole, refusals.

    A task says what the loss of a micro-batch is (`loss_of`) and what a validation measures (`measure`).

    Args:
        model: the student; what is to stay fixed has `requires_grad=False`.
        objective: calibration and divergence, weights.
        has_teacher: whether there is one; needed where the objective's kd_weight is above 0.
        train_examples, validation_examples: what `collator` makes batches of.
        tokenizer: saved beside the student, if there is one.
    """

    control: TrainerControl
    how_logits = ""
    """How the logits are made and why, in one line, where there is a choice."""

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        objective: Objective,
        has_teacher: bool,
        train_examples: Any,
        validation_examples: Any,
        collator: Any,
        tokenizer: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        if args.n_gpu > 1:
            raise InputError(
                f"{args.n_gpu} GPUs in one process are not supported; use torchrun, or CUDA_VISIBLE_DEVICES=0"
            )
        if not has_teacher and objective.kd_weight > 0:
            raise InputError("teacher is None, and the objective's kd_weight is above 0; give one, or set kd_weight=0")
        args.remove_unused_columns = False
        args.logging_nan_inf_filter = False
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_examples,
            eval_dataset=validation_examples,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        self.objective = objective
        self.model_accepts_loss_kwargs = True  # the loss is already a mean over the step's tokens
        self._exponents: dict[str, float] = {}
        self._log, self._look_at_rows = StepLog(), False

    def loss_of(
        self, model: nn.Module, inputs: dict[str, Tensor], objective: Objective, count: Tensor | int | None
    ) -> Tensor:
        """The scalar loss of a micro-batch, scaled so that those of a step add up to its mean; writes the log.

        Args:
            count: tokens or images that count in the whole step, of all ranks; None: those of this batch.
        """
        raise NotImplementedError

    def measure(self, examples: Any) -> dict[str, float]:
        """What a validation says of the student, by name."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        if isinstance(self.objective.divergence, AlphaBetaSchedule):
            self._exponents = self.objective.divergence.at(self._progress()).parameters  # the last used are logged
        total = self.loss_of(model, inputs, self.objective.at(self._progress()), num_items_in_batch)
        if not torch.isfinite(total):
            raise InputError(
                f"the loss is {total.item()} at step {self.state.global_step + 1}; lower training.learning_rate "
                "or choose a divergence that is finite where a probability is 0"
            )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            return total * self.accelerator.num_processes  # undone by the mean of gradients over ranks
        return total

    @staticmethod
    def step_of(objective: Objective) -> Callable[..., dict[str, float]] | None:
        """`mass_scalars` under the objective's calibration, for the log; None where it looks at a whole batch."""
        calibration = objective.calibration
        return partial(mass_scalars, calibration) if isinstance(calibration, DivergenceCalibration) else None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one step and its count of tokens or images."""
        self._look_at_rows = (self.state.global_step + 1) % max(self.state.logging_steps or 1, 1) == 0
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _progress(self) -> float:
        """Of the training: 0 at its first step, 1 at its last."""
        return min(1.0, self.state.global_step / max(self.state.max_steps - 1, 1))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "validation"
    ) -> dict[str, float]:
        """`measure` of the validation examples, logged under `validation_...`."""
        measured = self.measure(self.eval_dataset if eval_dataset is None else eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._log.started = time.monotonic()  # validation comes right after a line; or its time counts for little
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        return super()._determine_best_metric({f"eval_{name}": value for name, value in metrics.items()}, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        norm = float(logs.get("grad_norm", 0.0))
        if not math.isfinite(norm) and not self.args.fp16:  # whose scaled loss may overflow, and leaves the step out
            raise InputError(
                f"the gradient is {norm} at step {self.state.global_step}, which the step has put into the weights; "
                "lower training.learning_rate, and go on from the last checkpoint or afresh"
            )
        if "loss" in logs:
            line, self._log = self._log, StepLog()
            logs |= self.figures(summed(line.sums), time.monotonic() - line.started)
            logs |= self._exponents
        super().log(logs, start_time)

    def figures(self, sums: dict[str, float], seconds: float) -> dict[str, float]:
        """A line of the log, out of the sums over all ranks."""
        return figures(sums, seconds, self.args.device)

    def save_extra(self, folder: Path) -> None:
        """What a task keeps in a checkpoint beside the student and the optimiser."""

    def load_extra(self, folder: Path) -> None:
        """Reads it back."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The Trainer calls it on every rank before the first step, with the checkpoint it goes on from."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_extra(Path(checkpoint))

    def keep_step(self) -> None:
        """A checkpoint of the steps that are done, for a training that broke off within the next one."""
        self._save_checkpoint(self.model, None)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint is marked when it is whole; one that cannot be written is removed, the earlier ones stay."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            self.save_extra(folder)
        except (OSError, RuntimeError, SafetensorError) as error:  # all three mean a disk that does not take it
            shutil.rmtree(folder, ignore_errors=True)
            raise InputError(
                f"run_dir: the checkpoint of step {self.state.global_step} cannot be written ({_first_line(error)}); "
                "free some disk, then go on from the last one with resume=true"
            ) from error
        self.accelerator.wait_for_everyone()  # each rank has written its part
        if self.args.should_save:
            (folder / WHOLE_MARK).touch()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
