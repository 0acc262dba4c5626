"""The Hugging Face Trainer with a teacher, for language models and for image classifiers."""

from abkd.trainer.images import ImageDistillationTrainer
from abkd.trainer.language import DistillationTrainer
from abkd.trainer.loop import VALIDATION_DIVERGENCES, AbstractDistillationTrainer

__all__ = ["VALIDATION_DIVERGENCES", "AbstractDistillationTrainer", "DistillationTrainer", "ImageDistillationTrainer"]
