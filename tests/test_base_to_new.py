"""Tables of several runs: Table 16 of the paper to its last digit, and what is no run of a set."""

import json

import pytest

from abkd.base_to_new import main, read_runs, table

TABLE_16 = {
    "ImageNet": (81.23, 75.02, 78.00),
    "Caltech101": (99.46, 96.93, 98.18),
    "OxfordPets": (96.49, 98.55, 97.51),
    "StanfordCars": (83.43, 84.01, 83.72),
    "Flowers102": (99.24, 83.47, 90.67),
    "Food101": (92.46, 93.84, 93.14),
    "FGVCAircraft": (49.06, 43.05, 45.86),
    "SUN397": (83.88, 81.75, 82.80),
    "DTD": (86.52, 72.65, 78.98),
    "EuroSAT": (97.75, 83.92, 90.30),
    "UCF101": (90.44, 82.31, 86.18),  # printed as 86.73
}
"""ABKD's base, new and harmonic mean, in percent."""


def write_run(folder, name, base, new, **changed):
    folder.mkdir(parents=True)
    recipe = f"extends: clip_base_to_new\ndata: {{clip_set: {name}}}\n"
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    measured = {"base_accuracy": base / 100, "new_accuracy": new / 100, "harmonic_mean": 0.5}
    (folder / "results.json").write_text(json.dumps({"after": measured | changed}), encoding="utf-8")
    return str(folder)


def test_the_papers_table_comes_out(tmp_path, capsys):
    runs = [write_run(tmp_path / name, name, base, new) for name, (base, new, _) in TABLE_16.items()]
    assert main(runs) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, (name, figures) in zip(lines[1:12], TABLE_16.items(), strict=True):
        found = [float(each.rstrip("%")) for each in line.split()[-3:]]
        assert line.split()[0] == name and found == pytest.approx(figures, abs=0.011)
    assert lines[12].split()[-3:] == ["87.27%", "81.41%", "84.12%"]  # printed as 84.17, with 86.73 in it
    assert lines[13].split()[-3:] == ["87.27%", "81.41%", "84.24%"]


def test_runs_of_one_set_are_averaged(tmp_path):
    runs = [write_run(tmp_path / str(n), "DTD", base, new) for n, (base, new) in enumerate([(80, 60), (90, 70)])]
    runs.append(write_run(tmp_path / "cars", "StanfordCars", 50, 40))
    assert read_runs(runs) == {"DTD": pytest.approx((0.85, 0.65)), "StanfordCars": pytest.approx((0.5, 0.4))}
    assert "StanfordCars" in table(read_runs(runs[2:]))


@pytest.mark.parametrize("what", ["nothing", "of no set", "another row"])
def test_what_is_no_run_of_a_set_is_one_line(tmp_path, capsys, what):
    run = tmp_path / "run"
    if what != "nothing":
        write_run(run, "DTD", 80, 60, **({"harmonic_mean": None} if what == "of no set" else {}))
    assert main([str(run), *(["--row", "teacher"] if what == "another row" else [])]) == 2
    error = capsys.readouterr().err
    assert str(run) in error and error.count("\n") == 1
