"""What a trial changes in a recipe: a point of the plane, a seed, the length of the training. Torch-free."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from abkd.config import Recipe
from abkd.errors import InputError
from abkd.recipe import parse_recipe

KIND = "alpha_beta"
LENGTHS = ("num_steps", "num_epochs", "warmup_steps", "warmup_epochs", "milestones")
"""Of a recipe's training: what a shorter run has less of, so that its schedule is the same one, faster."""
OF_A_RUN = ("run_dir", "resume")


class Point(NamedTuple):
    alpha: float
    beta: float
    learning_rate: float | None = None
    """None is the recipe's own."""

    def __str__(self) -> str:
        return " ".join(f"{name}={value:g}" for name, value in self._asdict().items() if value is not None)


def divergence_path(recipe: Recipe) -> tuple[str, ...]:
    """The keys under which the recipe's alpha-beta-divergence is.

    Raises:
        InputError: there is none, or its exponents move during training.
    """
    objective = recipe.objective
    if objective.kd_weight == 0:
        raise InputError("objective.kd_weight: 0 leaves no divergence to tune; set it above 0")
    path: tuple[str, ...] = ("objective", "divergence")
    section = objective.divergence
    if section is None:
        path = ("objective", "calibration", "divergence")
        section = getattr(objective.calibration, "divergence", None)
        if section is None:
            kind = objective.calibration.kind
            raise InputError(f"objective.calibration.kind={kind} has no divergence to tune; take another calibration")
    if section.kind != KIND:
        field = ".".join(path)
        raise InputError(f"{field}.kind={section.kind} has no alpha and beta to tune; set {field}.kind={KIND}")
    for name in ("alpha", "beta"):
        if not isinstance(getattr(section, name), float | int):
            field = ".".join((*path, name))
            raise InputError(f"{field}: moves during training, and a trial sets a number; set {field}=0.5")
    return path


def at(
    recipe: Recipe, point: Point, *, run_dir: Path, seed: int | None = None, share: float = 1.0, resume: bool = False
) -> Recipe:
    """The recipe at a point of the plane.

    Args:
        seed: of the training; None is the recipe's own.
        share: of the recipe's training, above 0, at most 1; warm-up and milestones shrink with it.
    """
    content = recipe.to_dict()
    section = content
    for key in divergence_path(recipe):
        section = section[key]
    section |= {"alpha": point.alpha, "beta": point.beta}
    training = content["training"]
    if point.learning_rate is not None:
        training["learning_rate"] = point.learning_rate
    if seed is not None:
        training["seed"] = seed
    if share < 1:
        training |= {name: _shortened(training[name], share) for name in LENGTHS if name in training}
    return parse_recipe(content | {"run_dir": str(run_dir), "resume": resume})


def _shortened(length: Any, share: float) -> Any:
    """Whole steps stay whole, at least one; what is 0 stays 0."""
    if isinstance(length, list | tuple):
        return tuple(_shortened(each, share) for each in length)
    if isinstance(length, int):
        return max(round(length * share), 1) if length else 0
    return length * share


def fixed(recipe: Recipe, without_rate: bool) -> dict[str, Any]:
    """The recipe, flat, without what trials change: key -> value, the keys joined by dots.

    Args:
        without_rate: whether the learning rate is searched too.
    """
    point = ".".join(divergence_path(recipe))
    changed = {f"{point}.alpha", f"{point}.beta", *OF_A_RUN} | ({"training.learning_rate"} if without_rate else set())
    return {key: value for key, value in _flat(recipe.model_dump(by_alias=True, mode="json")) if key not in changed}


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
