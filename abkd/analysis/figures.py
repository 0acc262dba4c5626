"""The figures of `abkd figures`: numbers, then a drawing. `FIGURES` need no run; `RUN_FIGURES` show runs and trials."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from abkd.analysis.log_ratio import confidence, hardness, log_ratio, logit_gradient
from abkd.analysis.mass import RankMass
from abkd.analysis.movement import mass_step
from abkd.analysis.panels import Curve, Curves, Panel, Plane, mass_step_bars, rank_mass_bars
from abkd.analysis.plots import draw
from abkd.analysis.sweep import MEASURES, Row, Run, sensitivity, surface, validation_curves
from abkd.analysis.toy import POINTS, push_panel, toy_panels
from abkd.divergences import AlphaBeta

ALPHAS = (1.0, 0.5, 0.2, 0.0)
BETAS = (0.0, 0.3, 0.7, 1.0)
SMALL_STEP = 1e-4
"""LogR and the mass moved are proportional to small steps, and their ratio is free of the step size."""
RUNS_IN_A_PANEL = 6
"""Of bars, side by side in a bucket."""


class Figure(NamedTuple):
    numbers: Callable[[], tuple[Panel, ...]]
    caption: str
    layout: str = ""
    """Of `plots.draw`."""


class RunFigure(NamedTuple):
    numbers: Callable[[Sequence[Run], Sequence[Row]], tuple[Panel, ...]]
    """Runs and rows of a sweep, see `abkd.analysis.sweep` -> panels; none where they do not hold what it shows."""
    caption: str
    layout: str = ""


def effect_panels() -> tuple[Curves, ...]:
    """What alpha and beta do: the two factors, and LogR of one step per unit of the mass that it moves."""
    hard, confident = _factor_panels()
    return hard, _step_by_alpha(), confident, _step_by_beta()


def plane_panels() -> tuple[Panel, ...]:
    """The plane with the named divergences, and the two factors."""
    return (Plane(), *_factor_panels())


def mass_panels() -> tuple[Panel, ...]:
    """Where one step moves the mass of 64 rows like those of language models: Zipf's law, 2,000 classes."""
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 64, 2000, generator=random, dtype=torch.float64)
    teacher = -2.0 * torch.arange(1, 2001, dtype=torch.float64).log() + noise[0]
    student = 0.6 * teacher + noise[1]
    return mass_step_bars(
        {
            name: mass_step(AlphaBeta(*point), student=student, teacher=teacher, step_size=SMALL_STEP)
            for name, point in POINTS.items()
        }
    )


def toy_figure() -> tuple[Panel, ...]:
    """A student that cannot fit its teacher under four divergences, and their pull on a class."""
    return (*toy_panels(), push_panel())


FIGURES = {
    "effects": Figure(effect_panels, "what α and β do to the gradient, and to one step", layout="ab;cd"),
    "toy": Figure(toy_figure, "one student family fitted under four divergences", layout="abe;cde"),
    "plane": Figure(plane_panels, "the named divergences in the (α, β) plane", layout="aab;aac"),
    "mass": Figure(mass_panels, "where one step moves the mass, by teacher rank and by error", layout="ab;cd"),
}


def _curves(runs: Sequence[Run], rows: Sequence[Row]) -> tuple[Panel, ...]:
    return _present(validation_curves(runs, measure) for measure in MEASURES)


def _masses(runs: Sequence[Run], rows: Sequence[Row]) -> tuple[Panel, ...]:
    """Panels of `RUNS_IN_A_PANEL` runs each; the student before is in all of them where all runs began with it."""
    found = {run.name: run.results for run in runs if run.results and "rank_mass" in run.results["after"]}
    starts = [results["before"]["rank_mass"] for results in found.values()]
    before = {"before": starts[0]} if starts and all(start == starts[0] for start in starts) else {}
    after = [(name, results["after"]["rank_mass"]) for name, results in found.items()]
    return tuple(
        rank_mass_bars({name: RankMass(**mass) for name, mass in (before | dict(some)).items()})
        for some in (after[start : start + RUNS_IN_A_PANEL] for start in range(0, len(after), RUNS_IN_A_PANEL))
    )


def _surfaces(runs: Sequence[Run], rows: Sequence[Row]) -> tuple[Panel, ...]:
    return _present(surface(_rows(runs, rows), measure) for measure in MEASURES)


def _sensitivities(runs: Sequence[Run], rows: Sequence[Row]) -> tuple[Panel, ...]:
    all_rows = _rows(runs, rows)
    quality = [name for name, measure in MEASURES.items() if measure.better == "higher"]
    return _present(sensitivity(all_rows, "alpha", name) for name in quality) + _present(
        sensitivity(all_rows, "beta", name) for name in ("entropy", "self_bleu")
    )


def _plane(runs: Sequence[Run], rows: Sequence[Row]) -> tuple[Panel, ...]:
    placed = tuple((run.name, run.alpha, run.beta) for run in runs if run.alpha is not None and run.beta is not None)
    return (Plane(placed),) if placed else ()


RUN_FIGURES = {
    "curves": RunFigure(_curves, "validation measures of the runs over the steps"),
    "masses": RunFigure(_masses, "probability mass of the trained students by teacher rank"),
    "surface": RunFigure(_surfaces, "each measure over the (α, β) plane"),
    "sensitivity": RunFigure(_sensitivities, "quality over α; entropy and Self-BLEU over β"),
    "runs": RunFigure(_plane, "the runs in the (α, β) plane", layout="aa;aa"),
}


def draw_figures(folder: Path, runs: Sequence[Run] = (), rows: Sequence[Row] = ()) -> list[Path]:
    """Draws `FIGURES`, and of `RUN_FIGURES` those that the runs and rows have something for, as NAME.png.

    Args:
        folder: is made where it is not there; files of these names are replaced.
        runs: finished or running trainings.
        rows: trials of a sweep.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in FIGURES.items():
        files.append(draw(figure.numbers(), folder / f"{name}.png", figure.layout))
    for name, run_figure in RUN_FIGURES.items():
        if panels := run_figure.numbers(runs, rows):
            files.append(draw(panels, folder / f"{name}.png", run_figure.layout))
    return files


def _factor_panels() -> tuple[Curves, Curves]:
    """The hardness factor over the error, the confidence factor over q."""
    errors = torch.logspace(-3, -0.02, 200, dtype=torch.float64)
    student = torch.full_like(errors, 0.01).log()
    teacher = (0.01 + errors).log()
    hard = tuple(
        Curve(f"α = {alpha:g}", _plain(errors), _plain(hardness(student=student, teacher=teacher, alpha=alpha)))
        for alpha in ALPHAS
    )
    q = torch.logspace(-4, 0, 200, dtype=torch.float64)
    confident = tuple(
        Curve(f"β = {beta:g}", _plain(q), _plain(confidence(student=q.log(), beta=beta))) for beta in BETAS
    )
    return (
        Curves("hardness at q = 0.01", "error p − q", "|p^α − q^α| / α", hard, log_x=True, log_y=True),
        Curves(
            "confidence", "q, the student's probability", "q^β", confident, log_x=True, log_y=True, y_range=(1e-4, 2)
        ),
    )


def _step_by_alpha() -> Curves:
    """LogR over the error of 41 classes to which the student gives one probability, so that beta does not matter."""
    student = torch.full((41,), 1 / 41, dtype=torch.float64).log()
    teacher = torch.linspace(-3, 3, 41, dtype=torch.float64).log_softmax(-1)
    curves = tuple(
        Curve(f"α = {alpha:g}", _plain(teacher - student), _plain(ratio))
        for alpha in ALPHAS
        for ratio in [_log_ratio_per_mass(AlphaBeta(alpha, 0.7), student, teacher)]
    )
    return Curves("one step, all q equal", "error ln p − ln q, nats", "LogR / mass moved, nats", curves)


def _step_by_beta() -> Curves:
    """LogR over q of classes whose errors are all alike. Each has a twin that is over-estimated by as much, and half of
    the mass is in a class that fits, so that the part of LogR that all classes share is next to nothing."""
    error = 0.01
    quarter = torch.linspace(-9, 0, 31, dtype=torch.float64).log_softmax(-1) + math.log(0.25)
    rest = torch.tensor([0.5, 1 - 0.5 * math.cosh(error)], dtype=torch.float64).log()
    student = torch.cat([quarter, quarter, rest[:1]])
    teacher = torch.cat([quarter + error, quarter - error, rest[1:]])
    curves = tuple(
        Curve(f"β = {beta:g}", _plain(quarter.exp()), _plain(ratio[: len(quarter)]))
        for beta in BETAS
        for ratio in [_log_ratio_per_mass(AlphaBeta(0.0, beta), student, teacher)]
    )
    title = f"one step at α = 0, all p = {math.exp(error):.2f} q"
    return Curves(title, "q, the student's probability", "LogR / mass moved, nats", curves, log_x=True)


def _log_ratio_per_mass(divergence: AlphaBeta, student: Tensor, teacher: Tensor) -> Tensor:
    """LogR of a small step on one row of logits `[vocab]`, over the mass that the step moves."""
    gradient = logit_gradient(divergence, student=student[None], teacher=teacher[None])
    q = student.log_softmax(-1)
    ratio = log_ratio(q[None], gradient, SMALL_STEP)[0]
    return ratio / (q.exp() * ratio.expm1()).abs().sum().mul(0.5)


def _rows(runs: Sequence[Run], rows: Sequence[Row]) -> list[Row]:
    return [*(row for run in runs if (row := run.row) is not None), *rows]


def _present(panels) -> tuple[Panel, ...]:
    return tuple(panel for panel in panels if panel is not None)


def _plain(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())
