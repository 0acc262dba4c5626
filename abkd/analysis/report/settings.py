"""Runs in groups: settings that differ in their seed alone, and comparisons of settings that may stand side by side."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from abkd.analysis.report.runs import Run, flat, number
from abkd.analysis.report.words import objective_words, value_words

NOT_A_SETTING = ("run_dir", "resume", "training.seed")
SAID_BY_THE_OBJECTIVE = ("objective.divergence", "objective.calibration", "objective.kd_weight", "objective.ce_weight")


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
