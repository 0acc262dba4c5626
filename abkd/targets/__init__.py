"""What a teacher gives for N tokens. Each kind hands out the logits of a range of rows, so that nobody needs all."""

from abkd.targets.mixture import MixtureTargets
from abkd.targets.top_k import TopKTargets
from abkd.targets.whole import DenseTargets, HiddenTargets

Targets = DenseTargets | HiddenTargets | TopKTargets | MixtureTargets

__all__ = ["DenseTargets", "HiddenTargets", "MixtureTargets", "Targets", "TopKTargets"]
