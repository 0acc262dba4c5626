"""What `abkd tune` can be asked for, read from the command line and checked against a recipe. Torch-free."""

import argparse
import itertools
import math
from dataclasses import dataclass, field
from importlib.util import find_spec

from abkd.config import Recipe
from abkd.errors import InputError
from abkd.tune.metrics import Metric, find_metric
from abkd.tune.plane import Line, Plane, Range
from abkd.tune.points import Point, divergence_path

SAMPLERS = {
    "paper": "alpha + beta from 0.8 to 1.1, alpha from 0.1, in steps of 0.1",
    "grid": "the steps of --alpha and --beta",
    "random": "uniform draws",
    "tpe": "Optuna's tree-structured Parzen estimator",
}
REDUCTION = 3
"""Of the points that were trained for a rung's length, one in so many goes on, and trains so many times longer."""


@dataclass(frozen=True)
class Search:
    """A search as it was asked for."""

    metric: Metric
    sampler: str = "paper"
    plane: Plane = field(default_factory=Plane)
    num_trials: int = 20
    """Of random and tpe; a grid has as many as it has points."""
    rates: tuple[float, ...] = ()
    """Learning rates to choose from; none searches alpha and beta alone."""
    num_rungs: int = 1
    """1 trains every point in full; 2 starts with a third of the training, 3 with a ninth, ..."""
    num_finalists: int = 3
    num_seeds: int = 3
    """Trainings of each finalist, under seeds that the search did not use."""
    seed: int = 0
    """Of random and tpe."""
    keep_students: bool = False

    @property
    def points(self) -> list[Point] | None:
        """Of a grid, in order; None where they are drawn."""
        if self.sampler not in ("paper", "grid"):
            return None
        places = self.plane.paper_grid() if self.sampler == "paper" else self.plane.grid()
        rates: tuple[float | None, ...] = self.rates or (None,)
        return [Point(*place, rate) for place, rate in itertools.product(places, rates)]

    @property
    def shares(self) -> list[float]:
        """Of the recipe's training, shortest first, the whole last."""
        return [self.share_after(REDUCTION**rung) for rung in range(self.num_rungs)]

    def share_after(self, step: int) -> float:
        """Of the training, in steps of the shortest run."""
        return step / REDUCTION ** (self.num_rungs - 1)


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    samplers = "; ".join(f"{name}: {what}" for name, what in SAMPLERS.items())
    add("--sampler", choices=SAMPLERS, default="paper", help=samplers)
    add("--trials", type=int, default=20, metavar="N", help="how many points random and tpe draw")
    add("--metric", help="what to go by, measured after training, as token_agreement, rouge_l, top1")
    add("--alpha", default="0:1", metavar="LOW:HIGH[:STEP]", help="bounds, and for a grid its step (0.2)")
    add("--beta", default="0:1", metavar="LOW:HIGH[:STEP]", help="likewise")
    add("--line", metavar="LEFT=NUMBER", help="points on a line alone: alpha+beta=1, alpha=1, beta=0.7, alpha-beta=0")
    add("--search-rate", metavar="RATE,RATE", help="learning rates to choose from, as 1e-4,3e-4")
    add("--rungs", type=int, default=1, metavar="R", help="short runs first: 3 trains a ninth, a third, then all")
    add("--finalists", type=int, default=3, metavar="K", help="best points to be trained again under other seeds")
    add("--seeds", type=int, default=3, metavar="S", help="how often each finalist is trained again")
    add("--sampler-seed", type=int, default=0, metavar="SEED", help="of random and tpe")
    add("--keep-students", action="store_true", help="keep the students of all trials, not of the best ones alone")
    add("--storage", metavar="URL", help="of Optuna's study, shared by as many processes as use it; a file by default")
    add("--study", metavar="NAME", help="of the study in its storage; the name of run_dir by default")
    add("--take-over", action="store_true", help="repeat the trials that another machine has left running")


def read_search(options: argparse.Namespace, recipe: Recipe) -> Search:
    """The search that the command line asks for.

    Raises:
        InputError: an option is malformed, or does not go with the recipe.
    """
    if find_spec("optuna") is None:
        raise InputError("tune: needs the package optuna; install it with pip install 'abkd[tune]'")
    divergence_path(recipe)
    for option, lowest in (("trials", 1), ("rungs", 1), ("finalists", 0), ("sampler_seed", 0)):
        if getattr(options, option) < lowest:
            name = option.replace("_", "-")
            raise InputError(f"--{name}: {getattr(options, option)} is refused: must be at least {lowest}")
    if options.finalists and options.seeds < 2:
        raise InputError(
            f"--seeds: {options.seeds} is refused: a spread takes at least 2; --finalists 0 repeats nothing"
        )
    search = Search(
        find_metric(recipe, options.metric),
        options.sampler,
        Plane(
            Range.parse(options.alpha, "--alpha"),
            Range.parse(options.beta, "--beta"),
            Line.parse(options.line) if options.line else None,
        ),
        options.trials,
        _rates(options.search_rate),
        options.rungs,
        options.finalists,
        options.seeds,
        options.sampler_seed,
        options.keep_students,
    )
    _check_length(recipe, search)
    assert search.points != []  # a grid without a point is refused while it is made
    return search


def _rates(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = (0.0,)
    if not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
        raise InputError(f"--search-rate: {text!r} is refused: give different numbers above 0, as 1e-4,3e-4")
    return rates


def _check_length(recipe: Recipe, search: Search) -> None:
    steps, shortest = recipe.training.num_steps, search.shares[0]
    if steps and steps * shortest < 1:
        raise InputError(
            f"--rungs: {search.num_rungs} starts with {steps * shortest:.2g} steps of training.num_steps={steps}; "
            "lower it, or raise training.num_steps"
        )
