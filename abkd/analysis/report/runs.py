"""Folders of runs -> what a report needs of them, as plain tuples. Loads no torch."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml

from abkd.analysis.report.words import facts, path_in_plane
from abkd.errors import InputError
from abkd.rundir import ENVIRONMENT, METRICS, RECIPE, RESULTS, RunDir

BEFORE = "before.json"
ROLES = ("teacher", "before", "after")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML has it


class Run(NamedTuple):
    name: str
    """As much of the folder's path as tells it from the others."""
    path: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    environment: Mapping[str, Any]
    """Empty where the folder has none."""
    records: Sequence[Mapping[str, Any]]
    """The lines of metrics.jsonl."""
    results: Mapping[str, Any]
    """Of an unfinished run `teacher` and `before` at most."""
    is_finished: bool

    @property
    def seed(self) -> Any:
        return flat(self.recipe).get("training.seed")

    @property
    def last_step(self) -> int:
        return max((record["step"] for record in self.records), default=0)

    @property
    def warnings(self) -> list[str]:
        return [str(record["warning"]) for record in self.records if "warning" in record]


class Cost(NamedTuple):
    training_s: float | None
    """None where it is not known, as for a resumed run."""
    num_steps: int
    num_counted: float
    """Tokens or images that counted, of all steps that are in the log."""
    per_s: float | None
    """Median of the log's lines."""
    peak_memory_gib: float | None
    num_parameters: float | None
    unit: str
    """tokens or images."""


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Each folder once, in the order given.

    Raises:
        InputError: a folder is missing or holds no run, or a file in it is torn; names it.
    """
    folders = list({path.resolve(): path for path in paths}.values())
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections -> `section.key`: value; an empty section is a value."""
    if not isinstance(content, Mapping) or not content:
        return {prefix: content}
    inner = ((f"{prefix}.{key}" if prefix else str(key), value) for key, value in content.items())
    return {name: leaf for key, value in inner for name, leaf in flat(value, key).items()}


def number(measured: Mapping[str, Any], key: str) -> float | None:
    """The figure under `key`; None where there is none."""
    value = measured.get(key)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def cost(run: Run) -> Cost:
    """What the run took."""
    unit = "images" if run.recipe.get("task") == "image_classification" else "tokens"

    def logged(key: str) -> list[float]:
        found = (number(record, key) for record in run.records)
        return [value for value in found if value is not None and math.isfinite(value)]

    speeds, memory = logged(f"{unit}_per_s"), logged("peak_memory_gib")
    return Cost(
        number(run.results, "training_s"),
        run.last_step,
        sum(logged(f"num_{unit}")),
        median(speeds) if speeds else None,
        max(memory, default=None),
        number(run.results.get("after") or run.results.get("before") or {}, "num_parameters"),
        unit,
    )


def _read(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"run: {str(folder)!r} {found}; give the folder of a run")
    if not (folder / RECIPE).is_file():
        inside = sorted(file.parent for file in folder.glob(f"*/{RECIPE}"))
        hint = f"it holds {len(inside)} runs: give {folder}/*/" if inside else "give the folder of abkd train's run_dir"
        raise InputError(f"run: {str(folder)!r} is no run's folder, it has no {RECIPE}; {hint}")
    text, recipe = _recipe(folder / RECIPE)
    results, before = _json(folder / RESULTS), _json(folder / BEFORE)
    return Run(
        name,
        folder,
        recipe,
        text,
        _json(folder / ENVIRONMENT),
        _records(folder),
        _checked(results or before, folder),
        is_finished=bool(results),
    )


def _recipe(file: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.load(text, _LOADER)
    except (yaml.YAMLError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict) or not _is_recipe(content):
        raise InputError(f"run: {file} is torn, or no recipe of abkd; leave out {str(file.parent)!r}")
    return text, content


def _is_recipe(content: dict[str, Any]) -> bool:
    """Whether all that is read of a recipe can be."""
    try:
        facts(content, {})
        path_in_plane(content)
        return isinstance(content["student"], dict)
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _json(file: Path) -> dict[str, Any]:
    """Empty where there is no file."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"run: {file} is torn or of something else; remove it, or leave out the run")
    return content


def _records(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = RunDir(folder).read_metrics()
    except UnicodeDecodeError:
        raise InputError(f"run: {folder / METRICS} is no text in UTF-8; remove it, or leave out the run") from None
    return [line for line in lines if isinstance(line, dict) and type(line.get("step")) is int]


def _checked(results: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The shapes that drawings and tables rely on."""
    for role in ROLES:
        measured = results.get(role, {})
        if not isinstance(measured, dict) or not all(
            (
                measured.get("rank_mass") is None or _is_mass(measured["rank_mass"]),
                _are_rows(measured.get("per_class", []), (str, int, (int, float))),
                _are_rows(measured.get("confusions", []), (str, str, int, (int, float))),
                _are_sets(measured.get("sets", {})),
            )
        ):
            raise InputError(f"run: {folder / RESULTS} holds something else than measures under {role!r}; leave it out")
    return results


def _is_mass(mass: Any) -> bool:
    """Labels, and as many numbers for student and teacher each."""
    if not isinstance(mass, dict) or not {"labels", "student", "teacher"} <= set(mass):
        return False
    labels, *shares = rows = [mass[key] for key in ("labels", "student", "teacher")]
    if not all(isinstance(row, list) and len(row) == len(labels) for row in rows):
        return False
    return all(isinstance(share, (int, float)) for row in shares for share in row)


def _are_rows(rows: Any, kinds: tuple[Any, ...]) -> bool:
    """Lists whose entries are of these kinds, in this order."""
    return isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == len(kinds) and all(map(isinstance, row, kinds)) for row in rows
    )


def _are_sets(sets: Any) -> bool:
    return isinstance(sets, dict) and all(
        isinstance(each, dict) and number(each, "mean") is not None for each in sets.values()
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as it takes to tell all apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
