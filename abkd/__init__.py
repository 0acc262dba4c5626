"""abkd: distillation with the alpha-beta-divergence. This is the catalogue of public names.

Names load on first use, so that `import abkd` and the command line do not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abkd.data.image_files import read_images
    from abkd.data.images import Augmentation, ImageStore
    from abkd.divergences import AlphaBeta, ForwardKL, ReverseKL
    from abkd.divergences.alpha_beta import alpha_beta, forward_kl, reverse_kl
    from abkd.errors import InputError
    from abkd.head import LMHead
    from abkd.kernels import linear_divergence
    from abkd.models.classifiers import load_classifier
    from abkd.objective import Objective
    from abkd.targets import DenseTargets, HiddenTargets, MixtureTargets, TopKTargets
    from abkd.teachers.cached import CachedTeacher
    from abkd.teachers.classifier import ClassifierTeacher
    from abkd.teachers.in_process import InProcessTeacher
    from abkd.teachers.mixture import MixtureTeacher
    from abkd.teachers.served import ServedTeacher
    from abkd.trainer import DistillationTrainer, ImageDistillationTrainer


_HOMES = {
    "AlphaBeta": "abkd.divergences",
    "Augmentation": "abkd.data.images",
    "CachedTeacher": "abkd.teachers.cached",
    "ClassifierTeacher": "abkd.teachers.classifier",
    "DenseTargets": "abkd.targets",
    "DistillationTrainer": "abkd.trainer",
    "ForwardKL": "abkd.divergences",
    "HiddenTargets": "abkd.targets",
    "ImageDistillationTrainer": "abkd.trainer",
    "ImageStore": "abkd.data.images",
    "InProcessTeacher": "abkd.teachers.in_process",
    "InputError": "abkd.errors",
    "LMHead": "abkd.head",
    "MixtureTargets": "abkd.targets",
    "MixtureTeacher": "abkd.teachers.mixture",
    "Objective": "abkd.objective",
    "ReverseKL": "abkd.divergences",
    "ServedTeacher": "abkd.teachers.served",
    "TopKTargets": "abkd.targets",
    "alpha_beta": "abkd.divergences",
    "forward_kl": "abkd.divergences",
    "linear_divergence": "abkd.kernels",
    "load_classifier": "abkd.models.classifiers",
    "read_images": "abkd.data.image_files",
    "reverse_kl": "abkd.divergences",
}

__all__ = [
    "AlphaBeta",
    "Augmentation",
    "CachedTeacher",
    "ClassifierTeacher",
    "DenseTargets",
    "DistillationTrainer",
    "ForwardKL",
    "HiddenTargets",
    "ImageDistillationTrainer",
    "ImageStore",
    "InProcessTeacher",
    "InputError",
    "LMHead",
    "MixtureTargets",
    "MixtureTeacher",
    "Objective",
    "ReverseKL",
    "ServedTeacher",
    "TopKTargets",
    "alpha_beta",
    "forward_kl",
    "linear_divergence",
    "load_classifier",
    "read_images",
    "reverse_kl",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'abkd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
