"""Imports go down: the floors of the house, and who may import what from outside."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "abkd"
FLOORS = {
    "errors": -2, "processes": -1, "ranges": -1, "ranks": -1, "packing": -1,
    "config": 0, "recipe": 1, "engine": 1, "divergences": 0, "head": 0, "vocab": 0, "rundir": 0, "paths": 0,
    "generation": 1, "generation_vllm": 2, "calibrations": 1, "targets": 1, "kernels": 2,
    "objective": 3, "features": 3,
    "teachers": 4, "data": 4, "models": 4, "evaluation": 4, "analysis": 4,
    "diagnostics": 0, "callbacks": 4,
    "log": 4, "trainer": 5,
    "image_inputs": 6, "inputs": 7, "parts": 6, "card": 6, "fit": 7, 
    "language_teachers": 7, "setup": 8, "caching": 11, "measures": 9, "answers": 9,
    "run_figures": 6, "explore": 5, "tasks": 10, "base_to_new": 10, "advise": 11, "own_rows": 11,
    "evaluate": 11, "run": 11,
    "tune": 12, "demo": 12, "cli": 13, "__main__": 14,
}  # fmt: skip
ONLY_IN = {
    "datasets": {"data/sources.py"},
    "matplotlib": {"analysis/plots.py"},
    "peft": {"models/adapters.py"},
    "pydantic": {
        "config/fields.py",
        "config/image_models.py",
        "config/images.py",
        "config/language.py",
        "config/objective.py",
        "config/teachers.py",
        "config/training.py",
        "recipe.py",
    },
    "requests": {"teachers/connection.py"},
    "rich": {"analysis/table.py"},
    "rouge_score": {"evaluation/rouge.py"},
    "vllm": {"generation_vllm.py"},
    "optuna": {"tune/study.py"},
    "timm": {"models/classifier_libraries.py"},
    "triton": {"kernels/triton.py"},
}
TORCH_FREE = [
    "errors.py",
    "ranges.py",
    "config/__init__.py",
    "config/fields.py",
    "config/image_models.py",
    "config/images.py",
    "config/language.py",
    "config/objective.py",
    "config/teachers.py",
    "config/training.py",
    "recipe.py",
    "paths.py",
    "teachers/cache/manifest.py",
    "teachers/connection.py",
    "teachers/servers.py",
    "caching/options.py",
    *(f"tune/{name}.py" for name in ["__init__", "plane", "points", "metrics", "study", "folder"]),
    "caching/check.py",
    "rundir.py",
    "inputs.py",
    "cli.py",
    "vocab.py",
    "__init__.py",
]
TORCH_FREE += [
    "data/instructions.py",
    "data/sources.py",
    "data/image_files.py",
    "data/image_arrays.py",
    "data/labelled_images.py",
    "data/decoding.py",
    "data/cifar_files.py",
    "image_inputs.py",
    "models/classifiers.py",
    "models/classifier_spec.py",
    "models/cifar/__init__.py",
    "data/clip_sets.py",
    "analysis/spread.py",
    "tune/options.py",
    *(
        f"analysis/report/{name}.py"
        for name in [
            "__init__",
            "runs",
            "settings",
            "curves",
            "words",
            "markup",
            "svg",
            "plane",
            "sections",
            "results",
            "views",
        ]
    ),
    "models/pretrained.py",
    "models/adapters.py",
    "ranks.py",
    "processes.py",
    "engine.py",
]


def imports(file: Path, top_level_only: bool = False) -> set[str]:
    """Every module that the file imports, as a dotted name."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names if node.module == "abkd"}
            found |= submodules or {node.module}
    return found


def module_of(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").parts[0]


def upward_arrows(files: list[Path]) -> list[str]:
    wrong = []
    for file in files:
        here = module_of(file)
        if here == "__init__":
            continue
        for name in imports(file):
            there = name.split(".")[1] if name.startswith("abkd.") else None
            if there is None or there == here:
                continue
            if FLOORS[there] >= FLOORS[here]:
                wrong.append(f"{file.relative_to(ROOT)} imports abkd.{there}")
    return wrong


FILES = sorted(ROOT.rglob("*.py"))


def test_imports_go_down():
    assert upward_arrows(FILES) == []


def test_an_upward_arrow_is_found(tmp_path, monkeypatch):
    planted = tmp_path / "head.py"
    planted.write_text("def f():\n    from abkd.trainer import DistillationTrainer\n", encoding="utf-8")
    monkeypatch.setattr("test_layers.ROOT", tmp_path)
    assert upward_arrows([planted]) == ["head.py imports abkd.trainer"]


def test_every_module_has_a_floor():
    assert {module_of(file) for file in FILES} - {"__init__"} == set(FLOORS)


@pytest.mark.parametrize("package", ONLY_IN)
def test_outside_packages_stay_where_they_belong(package):
    users = {str(file.relative_to(ROOT)) for file in FILES if any(n.split(".")[0] == package for n in imports(file))}
    assert users == ONLY_IN[package]


@pytest.mark.parametrize("name", TORCH_FREE)
def test_no_torch_at_the_top(name):
    heavy = {"torch", "transformers", "accelerate", "matplotlib", "peft"}
    assert not heavy & {module.split(".")[0] for module in imports(ROOT / name, top_level_only=True)}
