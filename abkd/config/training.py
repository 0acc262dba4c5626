"""How to train, whatever the task."""

from typing import Literal

from pydantic import Field, model_validator

from abkd.config.fields import Count, CountOrZero, NonNegative, Positive, Section


class Training(Section):
    num_steps: CountOrZero = 0
    """Optimiser steps; 0 means that num_epochs decides."""
    num_epochs: NonNegative = 0.0
    """Passes over the data; 0 means that num_steps decides."""
    batch_size: Count = 8
    """Examples per device and micro-batch."""
    accumulation: Count = 1
    """Micro-batches per optimiser step."""
    learning_rate: Positive
    weight_decay: NonNegative = 0.01
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 compute the student under autocast; its weights and the losses stay fp32. fp16 scales the loss, and
    needs a GPU."""
    engine: Literal["ddp", "fsdp2", "zero2"] = "ddp"
    """Of several processes: ddp gives each the whole student; fsdp2 shards student and teacher over GPUs; zero2 shards
    gradients and optimiser (DeepSpeed; its bf16 holds the weights in bf16). One process needs none."""
    activation_checkpointing: bool = False
    """Less memory, about a third more time."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""
    seed: int = Field(default=0, ge=0)
    """Order of the data and dropout."""
    log_every: Count = 1
    """Steps between lines of metrics.jsonl."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where the log goes besides metrics.jsonl; each needs its own package. TensorBoard's files go to the run's folder.
    """

    @model_validator(mode="after")
    def _one_length(self):
        if bool(self.num_steps) == bool(self.num_epochs):
            raise ValueError(
                f"set exactly one of num_steps (is {self.num_steps}) and num_epochs (is {self.num_epochs:g}) above 0"
            )
        return self

    @property
    def selected_on(self) -> str:
        """What decides which step's student is that of the run: last, or what a validation measures."""
        return "last"

    @property
    def chooses_best(self) -> bool:
        """Whether the student of the run may be that of an earlier step than the last."""
        return self.selected_on != "last"
