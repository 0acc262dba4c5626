"""What a search can go by: figures of a run's results, and which way they are good. Torch-free."""

import difflib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from abkd.config import LanguageRecipe, Recipe
from abkd.errors import InputError


class Metric(NamedTuple):
    name: str
    greater_is_better: bool
    needs: str = ""
    """What the recipe must have for it, where it has not."""

    def of(self, results: Mapping[str, Any]) -> float:
        """Of the trained student, out of the run's results."""
        value: Any = results["after"]
        for key in self.name.split("."):
            value = value[key]
        return float(value["mean"] if isinstance(value, Mapping) else value)

    def is_better(self, one: float, other: float) -> bool:
        return one > other if self.greater_is_better else one < other

    def best_first(self, value: float) -> float:
        """A key to sort by: the best comes first, what is not a number last."""
        if math.isnan(value):
            return math.inf
        return -value if self.greater_is_better else value


LOWER = ("forward_kl", "reverse_kl", "alpha_beta")
"""Divergences from the teacher, of both tasks."""


def metrics_of(recipe: Recipe) -> dict[str, Metric]:
    """By name, the default first; `needs` says which of them the recipe does not produce."""
    if isinstance(recipe, LanguageRecipe):
        evaluation = recipe.evaluation
        answers = "" if evaluation.num_generated else "evaluation.num_generated above 0"
        sets = "" if evaluation.sets else "evaluation.sets"
        found = [
            Metric("token_agreement", True),
            *(Metric(name, False) for name in (*LOWER, "next_token_loss")),
            Metric("rouge_l", True, answers),
            Metric("sets_mean", True, sets),
            *(Metric(f"sets.{name}", True) for name in evaluation.sets),
        ]
    else:
        found = [
            *(Metric(name, True) for name in ("top1", "top5", "agreement")),
            *(Metric(name, False) for name in (*LOWER, "cross_entropy", "calibration_error")),
        ]
    return {metric.name: metric for metric in found}


def find_metric(recipe: Recipe, name: str | None) -> Metric:
    """The metric of this name, or the task's default.

    Raises:
        InputError: there is none, or the recipe does not produce it.
    """
    known = metrics_of(recipe)
    if name is None:
        return next(iter(known.values()))
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"--metric: {name!r} is unknown; {hint}known here are {', '.join(known)}")
    if needs := known[name].needs:
        raise InputError(f"--metric: {name} is not measured under this recipe; it needs {needs}")
    return known[name]
