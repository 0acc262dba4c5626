"""What every divergence asks of its two inputs."""

import torch
from torch import Tensor

from abkd.errors import InputError


def matching_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both `[..., vocab]` in one dtype, fp32 at least. Raises InputError where their shapes differ."""
    if student.shape != teacher.shape:
        raise InputError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape [..., vocab]"
        )
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.to(dtype)
