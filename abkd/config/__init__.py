"""Every option of every recipe. A recipe is a YAML file with these sections; unknown keys are refused.

Pydantic and YAML only: a recipe is checked before torch is imported. One frozen model per `kind`. Files and command
lines are read in `abkd.recipe`. `language` and `images` hold the recipe of each task, `objective` and `training` what
they share.
"""

from abkd.config.fields import Recipe
from abkd.config.images import Augmentation, ImageObjective, ImageRecipe
from abkd.config.language import (
    Data,
    Evaluation,
    Fixed,
    LanguageRecipe,
    LoRA,
    Pretrained,
    Rollouts,
    Shrink,
    Student,
)
from abkd.config.objective import TEMPERATURES, Calibration, Divergence, Objective, Ramp
from abkd.config.teachers import HOW_ASKED, Cached, InProcess, Mixture, Served
from abkd.config.training import Training

TASKS: dict[str, type[Recipe]] = {"language_model": LanguageRecipe, "image_classification": ImageRecipe}
"""Name of a task -> its recipe."""

__all__ = [
    "HOW_ASKED",
    "TASKS",
    "TEMPERATURES",
    "Augmentation",
    "Cached",
    "Calibration",
    "Data",
    "Divergence",
    "Evaluation",
    "Fixed",
    "ImageObjective",
    "ImageRecipe",
    "InProcess",
    "LanguageRecipe",
    "LoRA",
    "Mixture",
    "Objective",
    "Pretrained",
    "Ramp",
    "Recipe",
    "Rollouts",
    "Served",
    "Shrink",
    "Student",
    "Training",
]
