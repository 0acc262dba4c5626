"""What the methods share: a frozen description, and the loss it builds with what that trains and remembers."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from abkd.errors import InputError


class FeatureLoss(nn.Module):
    """Called as `loss(student_feature, teacher_feature, example_ids)` it gives `[batch]`, whose mean is the loss.

    Its parameters are trained with the student, and its `state_dict` holds all that a resumed training needs; none of
    it is part of the student. Nothing flows back into the teacher. What it remembers moves in training mode alone.

    Call:
        student_feature, teacher_feature: `[batch, student_dim]`, `[batch, teacher_dim]`; taken in the dtype of the
            parameters, fp32 as built, also under autocast.
        example_ids: int64 `[batch]`, each example's place in the training data.

    Raises:
        InputError: a shape is another one, or an id is out of range.
    """

    def __init__(self, student_dim: int, teacher_dim: int, num_examples: int):
        super().__init__()
        self.student_dim, self.teacher_dim, self.num_examples = student_dim, teacher_dim, num_examples

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, example_ids: Tensor) -> Tensor:
        for name, feature, dim in (
            ("student_feature", student_feature, self.student_dim),
            ("teacher_feature", teacher_feature, self.teacher_dim),
        ):
            if feature.shape != (len(example_ids), dim):
                raise InputError(f"{name} must be [{len(example_ids)}, {dim}], got {list(feature.shape)}")
        self._check_ids(example_ids)
        dtype = next(self.parameters()).dtype
        with torch.autocast(student_feature.device.type, enabled=False):
            return self.per_sample(student_feature.to(dtype), teacher_feature.detach().to(dtype), example_ids)

    def per_sample(self, student: Tensor, teacher: Tensor, example_ids: Tensor) -> Tensor:
        """`[batch]` of checked features."""
        raise NotImplementedError

    def _check_ids(self, example_ids: Tensor) -> None:
        if example_ids.dtype != torch.int64 or example_ids.dim() != 1:
            raise InputError(f"example_ids must be int64 [batch], got {example_ids.dtype} {list(example_ids.shape)}")
        if len(example_ids) == 0:
            return
        low, high = torch.stack([example_ids.min(), example_ids.max()]).tolist()
        if not 0 <= low <= high < self.num_examples:
            raise InputError(f"example_ids must lie between 0 and {self.num_examples - 1}, got {low} to {high}")


@dataclass(frozen=True)
class FeatureMethod:
    """Options of a method; equal options make equal methods.

    Raises:
        InputError: an option is out of its range.
    """

    kind: ClassVar[str]
    seed: int = field(default=0, kw_only=True)

    def build(
        self, student_dim: int, teacher_dim: int, *, num_examples: int, labels: Tensor | None = None
    ) -> FeatureLoss:
        """The loss of one training, on the CPU in fp32, decided by `seed`; the global random state stays as it is.

        Args:
            student_dim, teacher_dim: of the features.
            num_examples: of the training data.
            labels: int64 `[num_examples]`, the class of each; for a method that asks for them.
        """
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return self.make(student_dim, teacher_dim, num_examples, labels)

    def make(self, student_dim: int, teacher_dim: int, num_examples: int, labels: Tensor | None) -> FeatureLoss:
        """`build`, from the global random state."""
        raise NotImplementedError


def unit(row: Tensor) -> Tensor:
    """row / |row| of each row `[..., dim]`, dim >= 1; a row of zeros stays one, with zero gradient."""
    nothing = (row == 0).all(-1, keepdim=True)
    row = row / row.detach().abs().amax(-1, keepdim=True).masked_fill(
        nothing, 1.0
    )  # squares neither under nor overflow
    return (row / row.square().sum(-1, keepdim=True).masked_fill(nothing, 1.0).sqrt()).masked_fill(nothing, 0.0)
