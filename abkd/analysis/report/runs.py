"""Folders of runs -> what a report needs of them, as plain tuples. Loads no torch."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml

from abkd.analysis.report.words import facts, objective_words, path_in_plane, value_words
from abkd.errors import InputError
from abkd.rundir import ENVIRONMENT, METRICS, RECIPE, RESULTS, RunDir

BEFORE = "before.json"
ROLES = ("teacher", "before", "after")
NOT_A_SETTING = ("run_dir", "resume", "training.seed")
SAID_BY_THE_OBJECTIVE = ("objective.divergence", "objective.calibration", "objective.kd_weight", "objective.ce_weight")


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


class Setting(NamedTuple):
    """Runs that differ in their seed alone."""

    key: str
    """A, B, ..."""
    label: str
    runs: tuple[Run, ...]

    def values(self, measure: str) -> list[float]:
        """Of the student after training, one a finished run that has it; empty where one of them is not finite."""
        found = [number(run.results.get("after", {}), measure) for run in self.runs]
        values = [value for value in found if value is not None]
        return values if all(map(math.isfinite, values)) else []


class Comparison(NamedTuple):
    """Settings of one task, teacher, data and protocol: their figures may stand beside each other."""

    settings: tuple[Setting, ...]

    @property
    def runs(self) -> list[Run]:
        return [run for setting in self.settings for run in setting.runs]


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


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """The runs in groups that may stand beside each other, and there by setting."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[_canonical({key: run.recipe.get(key) for key in ("task", "teacher", "data", "evaluation")})].append(run)
    keys = iter(_letters(number) for number in range(len(runs)))
    found = []
    for members in groups.values():
        by_setting: dict[str, list[Run]] = defaultdict(list)
        for run in members:
            by_setting[_canonical(_setting_of(run))].append(run)
        labels = _labels([each[0] for each in by_setting.values()])
        pairs = zip(by_setting.values(), labels, strict=True)
        found.append(Comparison(tuple(Setting(next(keys), label, tuple(each)) for each, label in pairs)))
    return found


def references(comparison: Comparison) -> list[tuple[str, list[dict[str, Any]]]]:
    """Teacher, and student before training, once for each student: name -> what was measured, different ones only."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for run in comparison.runs:
        for role, section_name in (("teacher", "teacher"), ("before", "student")):
            if measured := run.results.get(role):
                owner = (role, _canonical(run.recipe.get(section_name)))
                found.setdefault(owner, {})[_canonical(measured)] = measured
    names = {"teacher": "teacher", "before": "student before"}
    several = sum(role == "before" for role, _ in found) > 1
    ordered = sorted(found.items(), key=lambda item: item[0][0] != "teacher")
    titled = []
    for (role, content), measured in ordered:
        of = ", ".join(each.key for each in comparison.settings if _owns(each, content))
        title = f"{names[role]} ({of})" if role == "before" and several else names[role]
        titled.append((title, list(measured.values())))
    return titled


def differing(runs: Sequence[Run]) -> list[str]:
    """Keys of the recipes that are not the same in all runs, but for their folders."""
    recipes = [flat(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in ("run_dir", "resume"))
    return [key for key in keys if len({_canonical(recipe.get(key)) for recipe in recipes}) > 1]


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
        content = yaml.safe_load(text)
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


def _setting_of(run: Run) -> dict[str, Any]:
    return {key: value for key, value in flat(run.recipe).items() if key not in NOT_A_SETTING}


def _owns(setting: Setting, student: str) -> bool:
    return _canonical(setting.runs[0].recipe["student"]) == student


def _labels(runs: Sequence[Run]) -> list[str]:
    """What each run was trained under, with whatever else differs between them."""
    others = [
        key
        for key in differing(runs)
        if key not in NOT_A_SETTING and not key.startswith(SAID_BY_THE_OBJECTIVE) and not key.startswith("teacher")
    ]
    return [
        ", ".join([objective_words(run.recipe), *(value_words(key, flat(run.recipe).get(key)) for key in others)])
        for run in runs
    ]


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as it takes to tell all apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _letters(index: int) -> str:
    """A, ..., Z, AA, AB, ..."""
    letters = ""
    index += 1
    while index:
        index, place = divmod(index - 1, 26)
        letters = chr(ord("A") + place) + letters
    return letters


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
