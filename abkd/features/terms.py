"""What a trainer holds of feature distillation: a method between two layers, and its weight in the loss."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from abkd import ranges
from abkd.errors import InputError
from abkd.features.hooks import FeatureHook, Side
from abkd.features.losses import FeatureLoss, FeatureMethod


@dataclass(frozen=True)
class FeatureTerm:
    """weight * method(feature of student_layer, feature of teacher_layer), added to an objective.

    Args:
        method: `CRD()` or `ITRD()`.
        student_layer, teacher_layer: dotted names, see `FeatureHook`.
        student_side, teacher_side: which of the layer's ends. The published recipes compare what the classifiers
            receive: "input" of the last layer.
        weight: above 0.

    Raises:
        InputError: the weight is out of its range.
    """

    method: FeatureMethod
    student_layer: str
    teacher_layer: str
    student_side: Side = "input"
    teacher_side: Side = "input"
    weight: float = 1.0

    def __post_init__(self):
        if not 0 < ranges.finite("weight", self.weight) <= 1e30:
            raise InputError(f"weight must be above 0, and at most 1e30, got {self.weight!r}; leave the term out for 0")

    def attach(
        self,
        student: nn.Module,
        teacher: nn.Module,
        run: Callable[[nn.Module], object],
        *,
        num_examples: int,
        labels: Tensor | None = None,
    ) -> "AttachedTerm":
        """Hooks both models, and builds the loss on the student's device.

        Args:
            run: gives a model a batch, `lambda model: model(images)`, so that the dimensions of the features are
                seen. Called once for each model, in evaluation mode without gradients; the models stay as they were.
            num_examples, labels: as in `FeatureMethod.build`.

        Raises:
            InputError: a layer is not there, is not called, or gives no feature.
        """
        hooks: list[FeatureHook] = []
        try:
            for model, layer, side in (
                (student, self.student_layer, self.student_side),
                (teacher, self.teacher_layer, self.teacher_side),
            ):
                hooks.append(FeatureHook(model, layer, side))
                _run_once(model, run)
            student_dim, teacher_dim = (hook.take().shape[1] for hook in hooks)
            loss = self.method.build(student_dim, teacher_dim, num_examples=num_examples, labels=labels)
        except InputError:
            for hook in hooks:
                hook.close()
            raise
        return AttachedTerm(self, loss.to(next(student.parameters()).device), *hooks)


class AttachedTerm(nn.Module):
    """A term during a training. After the forward passes of both models, `term(example_ids)` is `[batch]`.

    A step of N examples over all micro-batches and ranks adds weight * sum / N of it to its loss. Its
    `parameters()` go to the optimizer beside the student's, and its `state_dict()` into the checkpoint; neither is
    part of the student.
    """

    def __init__(self, term: FeatureTerm, loss: FeatureLoss, student_hook: FeatureHook, teacher_hook: FeatureHook):
        super().__init__()
        self.term, self.loss = term, loss
        self._hooks = (student_hook, teacher_hook)

    @property
    def weight(self) -> float:
        return self.term.weight

    def forward(self, example_ids: Tensor) -> Tensor:
        """The loss's `[batch]` from the features of the passes that just ran; each pass serves once."""
        student_feature, teacher_feature = (hook.take() for hook in self._hooks)
        return self.loss(student_feature, teacher_feature.to(student_feature.device), example_ids)

    def detach(self) -> None:
        """Takes the hooks out of both models."""
        for hook in self._hooks:
            hook.close()


@torch.no_grad()
def _run_once(model: nn.Module, run: Callable[[nn.Module], object]) -> None:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        run(model)
    finally:
        for module, mode in modes:
            module.training = mode
