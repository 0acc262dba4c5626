"""Each example runs as it is started by hand, and its student comes closer to its teacher."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS = {
    "cached_teacher.py": 16,
    "images.py": 16,
    "images_from_scratch.py": 40,
    "language.py": 8,
    "language_from_scratch.py": 8,
}
FEWER_THAN = {
    "cached_teacher.py": 80,
    "images.py": 60,
    "images_from_scratch.py": 60,
    "language.py": 80,
    "language_from_scratch.py": 80,
}
"""Lines."""


def test_every_example_is_run_and_short():
    lines = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in EXAMPLES.glob("*.py")}
    assert lines.keys() == STEPS.keys() == FEWER_THAN.keys()
    assert [name for name in lines if lines[name] >= FEWER_THAN[name]] == []


@pytest.mark.parametrize("name", STEPS)
def test_the_divergence_from_the_teacher_falls(name, tmp_path):
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), "--steps", str(STEPS[name])]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = "\n".join(line for line in done.stdout.splitlines() if line.startswith("alpha_beta: "))
    before, after = (float(re.search(rf"([\d.]+) {when}", lines)[1]) for when in ("before", "after"))
    assert 0 < after < 0.8 * before
    assert list(tmp_path.iterdir()) == []
