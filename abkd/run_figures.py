"""The paper's figures, and those of runs and searches, out of their folders."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from abkd.analysis.figures import draw_figures
from abkd.analysis.sweep import Run
from abkd.errors import InputError
from abkd.rundir import RECIPE, RunDir

POINTS = {"forward_kl": (1.0, 0.0), "reverse_kl": (0.0, 1.0)}
"""Divergences that are points of the plane under another name."""


def make_figures(folder: Path, runs: Sequence[Path] = (), trials: Path | None = None) -> list[Path]:
    """`analysis.figures.draw_figures` of these folders.

    Args:
        folder: gets NAME.png, one for each figure that there is something for.
        runs: folders of runs, finished or not.
        trials: tune.json of a search.

    Raises:
        InputError: a folder holds no run; tune.json is missing or torn.
    """
    rows = []
    if trials is not None:
        try:
            rows = json.loads(trials.read_text(encoding="utf-8"))["surface"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"--trials: {str(trials)!r} is no tune.json; give that of a search") from None
    return draw_figures(folder, [read_run(path) for path in runs], rows)


def read_run(path: Path) -> Run:
    """A run as its folder tells it, with its point of the plane."""
    run_dir = RunDir(path)
    if not (path / RECIPE).is_file():
        raise InputError(f"run: {str(path)!r} holds no run; give the folder that abkd train made")
    recipe = yaml.safe_load((path / RECIPE).read_text(encoding="utf-8"))
    alpha, beta = _point(recipe["objective"])
    return Run(path.name, alpha, beta, run_dir.read_metrics(), run_dir.read_results())


def _point(objective: dict[str, Any]) -> tuple[float | None, float | None]:
    """(alpha, beta) of the divergence, wherever it stands; None off the plane, or where they move."""
    divergence = objective["divergence"] or (objective["calibration"] or {}).get("divergence") or {}
    if divergence.get("kind") != "alpha_beta":
        return POINTS.get(divergence.get("kind", ""), (None, None))
    alpha, beta = divergence["alpha"], divergence["beta"]
    return (None, None) if isinstance(alpha, dict) or isinstance(beta, dict) else (alpha, beta)
