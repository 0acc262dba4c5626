"""The Python blocks of README run as written; what the docs name exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import abkd
from abkd import config
from abkd.calibrations import CALIBRATIONS
from abkd.parts import make_objective

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {
    f"{page.name} {number}": block
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
}


def test_the_python_blocks_are_found():
    assert {"README.md 0", "README.md 1", "kernels.md 0"} <= set(BLOCKS)


@pytest.mark.wheel
@pytest.mark.parametrize("name", BLOCKS)
def test_python_blocks_of_the_docs_run(name, tmp_path):
    done = subprocess.run([sys.executable, "-c", BLOCKS[name]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_the_docs_name_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:abkd|benchmarks|docs|tests|scripts)/[\w/.]*)`", text) + re.findall(
        r"\]\(([\w/.]+\.\w+)\)", text
    )
    assert [name for name in named if not ((ROOT / name).exists() or (page.parent / name).exists())] == []


def test_public_names_are_complete_and_importable():
    assert abkd.__all__ == sorted(abkd.__all__)
    assert set(abkd.__all__) == set(abkd._HOMES)
    for name in abkd.__all__:
        assert getattr(abkd, name).__doc__
    with pytest.raises(AttributeError, match="no_such_name"):
        abkd.no_such_name  # noqa: B018


def test_the_objectives_of_the_docs_are_objectives():
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/divergences.md").read_text(encoding="utf-8"), re.DOTALL)
    objectives = {
        name: make_objective(config.Objective.model_validate(section))
        for name, section in yaml.safe_load(block).items()
    }
    assert {objective.calibration.kind for objective in objectives.values()} == set(CALIBRATIONS) - {"wttm"}
    assert objectives["ABDKD"].divergence == abkd.AlphaBeta(1.0, 0.2)
