"""`abkd figures`: what is drawn of nothing, of runs and of a search, and what is refused."""

import json

import pytest
import yaml

from abkd import cli
from abkd.run_figures import read_run


def write_run(folder, divergence, top1=0.5):
    folder.mkdir()
    objective = {"divergence": divergence, "calibration": None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"objective": objective}))
    lines = [{"step": step, "validation_top1": top1 * step / 4} for step in (2, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "results.json").write_text(
        json.dumps(
            {"after": {"top1": top1, "entropy": 1.0}, "before": {"top1": 0.1}, "student_step": 4, "num_steps": 4}
        )
    )
    return folder


@pytest.mark.parametrize(
    "divergence, point",
    [
        ({"kind": "alpha_beta", "alpha": 0.2, "beta": 0.7}, (0.2, 0.7)),
        ({"kind": "forward_kl"}, (1, 0)),
        ({"kind": "reverse_kl"}, (0, 1)),
        ({"kind": "jsd", "mix": 0.5}, (None, None)),
        ({"kind": "alpha_beta", "alpha": {"from": 1, "to": 0}, "beta": 0.7}, (None, None)),
    ],
)
def test_a_run_stands_at_its_point_of_the_plane(tmp_path, divergence, point):
    run = read_run(write_run(tmp_path / "run", divergence))
    assert (run.alpha, run.beta) == point and run.name == "run" and len(run.metrics) == 2


def test_figures_of_runs_and_trials_are_drawn(tmp_path, capsys):
    runs = [
        write_run(tmp_path / f"run{number}", {"kind": "alpha_beta", "alpha": number / 2, "beta": 0.5}, 0.5 + number / 9)
        for number in range(3)
    ]
    trials = [{"alpha": a, "beta": b, "top1": a * b} for a in (0, 0.5, 1) for b in (0, 1)]
    (tmp_path / "tune.json").write_text(json.dumps({"surface": trials}))
    output = tmp_path / "figures"
    options = ["--trials", str(tmp_path / "tune.json"), "--output", str(output)]
    assert cli.main(["figures", *map(str, runs), *options]) == cli.DONE
    made = {file.stem for file in output.glob("*.png")}
    assert made >= {"effects", "toy", "plane", "mass", "curves", "surface", "sensitivity", "runs"}
    assert capsys.readouterr().out.count(".png") == len(made)


@pytest.mark.parametrize(
    "options, message", [(["nowhere"], "run: 'nowhere' holds no run"), (["--trials", "nowhere"], "--trials: 'nowhere'")]
)
def test_what_is_no_run_is_refused(tmp_path, capsys, options, message):
    assert cli.main(["figures", *options, "--output", str(tmp_path / "figures")]) == cli.USERS_MISTAKE
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
