"""Base-to-new accuracies of several runs, a data set each, as the papers' tables: python -m abkd.base_to_new RUN ..."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from abkd.errors import InputError
from abkd.evaluation.classification import base_to_new, harmonic_mean
from abkd.recipe import read_recipe
from abkd.rundir import RECIPE, RunDir

Accuracies = Mapping[str, tuple[float, float]]
"""Data set -> (base, new), shares from 0 to 1."""


def read_runs(folders: Sequence[str], row: str = "after") -> dict[str, tuple[float, float]]:
    """Of each data set, the means of base and of new accuracy over its runs, which may have several seeds.

    Args:
        row: of results.json: after, before or teacher.

    Raises:
        InputError: a folder holds no finished run, or none of a clip_set; the row is not there.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for folder in folders:
        run_dir = RunDir(Path(folder))
        results = run_dir.read_results()
        if results is None:
            raise InputError(f"run: {folder!r} holds no finished run; give the folder of one, or finish it")
        measured = results.get(row)
        if measured is None or measured.get("harmonic_mean") is None:
            raise InputError(f"run: {folder!r} has no base and new accuracy of {row!r}; give a run of a data.clip_set")
        name = read_recipe(str(run_dir.path / RECIPE)).data.clip_set
        found.setdefault(name, []).append((measured["base_accuracy"], measured["new_accuracy"]))
    columns = {name: zip(*pairs, strict=True) for name, pairs in found.items()}
    return {name: (fmean(base), fmean(new)) for name, (base, new) in columns.items()}


def table(accuracies: Accuracies) -> str:
    """A line for each set and two for all: the mean of the sets' harmonic means, and that of the means. In percent."""
    means = base_to_new(accuracies)
    rows = [(name, base, new, harmonic_mean(base, new)) for name, (base, new) in accuracies.items()]
    average = means["mean_base"], means["mean_new"]
    rows += [("mean, as the papers print it", *average, means["mean_of_harmonic_means"])]
    rows += [("harmonic mean of the means", *average, means["harmonic_mean_of_means"])]
    lines = [f"{'':28}   base    new     HM"]
    lines += [f"{name:28} {base:6.2%} {new:6.2%} {mean:6.2%}" for name, base, new, mean in rows]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m abkd.base_to_new", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of finished runs of data.clip_set")
    parser.add_argument("--row", choices=["after", "before", "teacher"], default="after", help="whose accuracies")
    options = parser.parse_args(arguments)
    try:
        print(table(read_runs(options.runs, options.row)))
    except InputError as error:
        print(f"abkd: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
