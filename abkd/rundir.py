"""The folder of a run: what was asked, on what machine, what happened, what came out. Standard library only."""

import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from abkd.errors import InputError
from abkd.ranks import num_ranks

RECIPE, ENVIRONMENT, METRICS, RESULTS = "recipe.yaml", "environment.json", "metrics.jsonl", "results.json"
CHECKPOINTS, STUDENT, WHOLE_MARK = "checkpoints", "student", "WHOLE"
EVALUATION = "evaluation"
PACKAGES = ("abkd", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")


class RunDir:
    """One run's folder.

    recipe.yaml       the resolved recipe; `abkd train recipe.yaml run_dir=NEW` repeats the run
    environment.json  versions, machine, commit, start
    metrics.jsonl     one JSON object a line: step and what was logged there
    checkpoints/      checkpoint-STEP/, resumable; a file WHOLE marks one that was written to its end
    student/          the trained student in Hugging Face format, with tokenizer and model card
    evaluation/       answers to the evaluation sets, by model, set and seed
    results.json      the before/after table
    report.html       all of it as one page
    """

    def __init__(self, path: Path):
        self.path = path

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def student(self) -> Path:
        return self.path / STUDENT

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def how_to_go_on(self) -> str:
        """The command that resumes an interrupted run."""
        return f"abkd train {self.path / RECIPE} resume=true"

    def check_new(self) -> None:
        """Refuses a path that exists, for a run is never written over, or that cannot be made."""
        if self.path.exists():
            raise InputError(
                f"run_dir: {str(self.path)!r} exists and is never written over; "
                "give another with run_dir=PATH, or go on with it by resume=true"
            )
        try:
            self.path.mkdir(parents=True)
            self.path.rmdir()
        except OSError as error:
            raise InputError(
                f"run_dir: {str(self.path)!r} cannot be made ({error.strerror}); give another with run_dir=PATH"
            ) from None

    def create(self, recipe: str) -> None:
        """Makes the folder and writes the recipe and the environment."""
        self.check_new()
        self.path.mkdir(parents=True)
        (self.path / RECIPE).write_text(recipe, encoding="utf-8")
        self.write_json(ENVIRONMENT, environment())

    def log(self, record: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, oldest first; a line torn by a crash is left out."""
        records = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else ():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
        return records

    def last_step(self) -> int:
        """The step of the last line of metrics.jsonl; 0 without one."""
        return max((record["step"] for record in self.read_metrics()), default=0)

    def drop_metrics_after(self, step: int) -> None:
        """Forgets the lines logged after the checkpoint that a resumed run starts from, and a torn last line."""
        kept = [json.dumps(record) + "\n" for record in self.read_metrics() if record["step"] <= step]
        if self.metrics.exists():
            self._replace(METRICS, "".join(kept))

    def drop_torn_checkpoints(self) -> None:
        """Removes what a crash left half written, which else would count among the checkpoints that are kept."""
        for folder in self.checkpoints.glob("checkpoint-*"):
            if not (folder / WHOLE_MARK).exists():
                shutil.rmtree(folder)

    def whole_checkpoints(self) -> list[Path]:
        """Checkpoints that were written to their end, oldest first."""
        found = [mark.parent for mark in self.checkpoints.glob(f"checkpoint-*/{WHOLE_MARK}")]
        return sorted(found, key=lambda folder: int(folder.name.rpartition("-")[2]))

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"checkpoint-{step}"

    def trainer_state(self) -> dict[str, Any] | None:
        """What the Trainer wrote of its state into the last whole checkpoint; None without one."""
        for folder in self.whole_checkpoints()[-1:]:
            return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        return None

    def best_step(self) -> int | None:
        """The step of the best validation, as of the last whole checkpoint; None where none is kept as the best."""
        return (self.trainer_state() or {}).get("best_global_step")

    def write_json(self, name: str, value: Any) -> None:
        self._replace(name, json.dumps(value, indent=2) + "\n")

    def read_json(self, name: str) -> Any | None:
        """The content of a JSON file of the run; None while there is none."""
        file = self.path / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def read_results(self) -> dict[str, Any] | None:
        """The before/after table; None while the run is not finished."""
        return self.read_json(RESULTS)

    def _replace(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}.part"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path / name)


def environment() -> dict[str, Any]:
    """What a reader needs to place a number: versions, machine, command, commit of the working tree if any."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "num_processes": num_ranks(),
        "versions": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of abkd's own checkout, with + where it was changed; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
