"""How the learning rate moves over the epochs of an image classifier's training."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RateFactor:
    """Factor of the learning rate at an epoch, 0 at the start, with fractions.

    Args:
        shape: steps multiplies it by `decay` at each milestone; cosine and linear go from 1 to 0 at `num_epochs`.
        num_epochs: of the training, above 0.
        milestones: epochs, rising.
        decay: between 0 and 1.
        warmup_epochs: over which the factor rises linearly from 0; cosine and linear start after them.
    """

    shape: Literal["steps", "cosine", "linear", "constant"]
    num_epochs: float
    milestones: tuple[float, ...] = ()
    decay: float = 0.1
    warmup_epochs: float = 0.0

    def __call__(self, epoch: float) -> float:
        if epoch < self.warmup_epochs:
            return epoch / self.warmup_epochs
        if self.shape == "constant":
            return 1.0
        if self.shape == "steps":
            return self.decay ** sum(epoch >= milestone for milestone in self.milestones)
        done = min(1.0, (epoch - self.warmup_epochs) / max(self.num_epochs - self.warmup_epochs, 1e-9))
        return 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
