"""Real trainings of tiny models behind the trials: what they share, how they go on, what they refuse."""

import contextlib
import copy
import io
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import make_llama, write_recipe

from abkd import InputError, cli
from abkd.recipe import read_recipe
from abkd.rundir import ENVIRONMENT, RECIPE, RunDir
from abkd.tasks import language
from abkd.tune.points import Point
from abkd.tune.runs import Runs, _digest, _is_begun, _on_validation

QUICK = ("training.num_steps=2", "teacher.remember=true", "data.max_train_rows=4", "data.max_validation_rows=2")
LINE = ("--sampler=grid", "--line=alpha=1", "--metric=forward_kl")


def abkd(*arguments):
    """(exit code, lines printed, lines of the refusal) of `abkd ARGUMENTS`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    refused = [line for line in err.getvalue().splitlines() if line.startswith("abkd: ")]
    return code, out.getvalue().splitlines(), refused


class Tuned(NamedTuple):
    folder: Path
    recipe: Path
    said: list[str]
    num_measured: int


COMMAND = (*LINE, "--beta=0:1:1", "--finalists=1", "--seeds=2", *QUICK)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, teacher_folder, data_file):
    """`abkd tune` over two points, the better one again under two seeds."""
    folder = tmp_path_factory.mktemp("tuned")
    recipe, measured, measure = write_recipe(folder, teacher_folder, data_file), [], language.measure_before
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(language, "measure_before", lambda *how: measured.append(1) or measure(*how))
        code, said, refused = abkd("tune", recipe, *COMMAND)
    assert code == cli.DONE, refused
    return Tuned(folder / "run", recipe, said, len(measured))


def results(folder):
    return RunDir(folder).read_results()


def test_teacher_data_and_measures_before_are_shared(tuned):
    assert sum(line.startswith("loading the teacher") for line in tuned.said) == 1
    assert sum(line.startswith("logits: ") for line in tuned.said) == 1
    assert tuned.num_measured == 1
    found = [results(tuned.folder / "trials" / f"{number:03d}") for number in range(4)]
    assert all(each["teacher"] == found[0]["teacher"] and each["before"] == found[0]["before"] for each in found)
    assert len({each["after"]["forward_kl"] for each in found}) >= 3  # of four examples two seeds may make one order


def test_the_report_has_the_figures_of_the_runs(tuned):
    report = json.loads((tuned.folder / "tune.json").read_text())
    for row in report["trials"]:
        after = results(tuned.folder / row["run"])["after"]
        assert row["value"] == after["forward_kl"] == row["measures"]["forward_kl"]
        assert row["measures"]["token_agreement"] == after["token_agreement"]
    assert [row["seed"] for row in report["trials"]] == [None, None, 1, 2]
    best = min(report["trials"][:2], key=lambda row: row["value"])
    assert report["recommended"]["beta"] == best["beta"]
    assert any(line.endswith(f"abkd train {tuned.folder / 'best.yaml'}") for line in tuned.said)
    assert (tuned.folder / "report.html").is_file() and (tuned.folder / "figures" / "plane.png").is_file()
    assert read_recipe(str(tuned.folder / "best.yaml")).objective.divergence.beta == best["beta"]


def test_a_trial_is_an_ordinary_run(tuned, tmp_path):
    again = tmp_path / "again"
    code, *_ = abkd("train", tuned.folder / "trials/001/recipe.yaml", f"run_dir={again}")
    first, second = results(tuned.folder / "trials/001"), results(again)
    for timed in (first, second):
        del timed["training_s"]
    assert code == cli.DONE and first == second


def test_a_run_that_was_finished_before_its_trial_is_read(tuned):
    """A kill may come between the two."""
    recipe, said = read_recipe(str(tuned.recipe), QUICK), []
    read = Runs(recipe, None, said.append)("trials/001", Point(1.0, 1.0), seed=None, share=1.0)
    assert read == results(tuned.folder / "trials/001") and said == []


@pytest.fixture
def without_pictures(monkeypatch):
    """They take longer than these trainings."""
    monkeypatch.setattr(cli, "_picture_search", lambda folder: None)


def test_the_same_command_trains_nothing_again(tuned, without_pictures):
    code, said, _ = abkd("tune", tuned.recipe, *COMMAND)
    assert code == cli.DONE and not any(line.startswith(("loading the teacher", "trial ")) for line in said)
    assert [line for line in said if line.startswith("recommended")] == [
        line for line in tuned.said if line.startswith("recommended")
    ]


def test_another_recipe_in_the_same_folder_is_refused(tuned):
    code, _, refused = abkd("tune", tuned.recipe, *COMMAND, "training.num_steps=3")
    assert code == cli.USERS_MISTAKE and len(refused) == 1
    assert "is a search with training.num_steps=2, and this one has 3; give another --study" in refused[0]
    code, _, refused = abkd("tune", tuned.recipe, *COMMAND, f"run_dir={tuned.folder / 'trials/000'}")
    assert code == cli.USERS_MISTAKE
    assert refused[0].endswith("exists and holds no search; give another with run_dir=PATH")


@pytest.mark.parametrize("step, goes_on", [(1, True), (2, False)], ids=["on the way", "in the last step"])
def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(
    recipe_file, tmp_path, monkeypatch, without_pictures, step, goes_on
):
    """The step after the signal is the last one that is trained."""
    log = RunDir.log

    def log_and_interrupt(self, record):
        log(self, record)
        if record["step"] == step and "loss" in record:
            signal.raise_signal(signal.SIGINT)

    command = ("tune", recipe_file, *LINE, "--beta=0:1:2", "--finalists=0", *QUICK, "training.num_steps=3")
    with monkeypatch.context() as patched:
        patched.setattr(RunDir, "log", log_and_interrupt)
        code, said, _ = abkd(*command)
    assert code == cli.INTERRUPTED and said[-1] == "stopped; the same command goes on"
    assert results(tmp_path / "run/trials/000") is None
    code, said, _ = abkd(*command)
    assert code == cli.DONE and any(line.startswith("going on from ") for line in said) == goes_on
    assert not (tmp_path / "run/trials/000/checkpoints").exists()
    assert len((tmp_path / "run/trials/000/metrics.jsonl").read_text().splitlines()) == 3


def test_mistakes_are_found_before_anything_is_loaded_and_leave_no_folder(recipe_file, tmp_path):
    for arguments, message in [
        (["data.train=/no/such"], "data.train: "),
        (["--metric=rouge_l"], "--metric: rouge_l is not measured under this recipe"),
        (["--storage=sqlite:////no/such/folder/x.db"], "--storage: sqlite:////no/such/folder/x.db cannot be opened"),
        (["objective.divergence.kind=forward_kl"], "objective.divergence.kind=forward_kl has no alpha and beta"),
    ]:
        code, said, refused = abkd("tune", recipe_file, *arguments)
        assert code == cli.USERS_MISTAKE and len(refused) == 1 and refused[0].startswith(f"abkd: {message}")
        assert said == [] and not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")  # of the libraries, which the command line quietens
def test_a_loss_that_is_not_finite_is_the_points(recipe_file, tmp_path):
    """The trial fails, and not the search; of a search of one point nothing is left."""
    code, said, refused = abkd(
        "tune", recipe_file, *LINE, "--beta=0:1:2", "--finalists=0", *QUICK, "training.learning_rate=1e30"
    )
    assert code == cli.USERS_MISTAKE and any("alpha=1 beta=0: failed, the gradient is " in line for line in said)
    assert refused[0].startswith("abkd: tune: no training came to an end, the first for: the gradient is ")
    (row,) = json.loads((tmp_path / "run/tune.json").read_text())["trials"]
    assert row["state"] == "failed" and "the gradient is nan at step 2" in row["error"]


def begun(recipe, run_dir, *, recipe_text, environment):
    run_dir.path.mkdir(parents=True)
    if recipe_text is not None:
        (run_dir.path / RECIPE).write_text(recipe_text)
    if environment:
        (run_dir.path / ENVIRONMENT).write_text("{}")
    return _is_begun(recipe, run_dir)


def test_what_a_kill_leaves_before_the_training_is_removed(recipe_file, tmp_path):
    recipe = read_recipe(str(recipe_file), QUICK)
    whole = recipe.to_yaml()
    assert not _is_begun(recipe, RunDir(tmp_path / "none"))
    for text in (None, whole[:50], whole):
        torn = RunDir(tmp_path / "torn")
        assert not begun(recipe, torn, recipe_text=text, environment=False) and not torn.path.exists()
    assert begun(recipe, RunDir(tmp_path / "begun"), recipe_text=whole, environment=True)


def test_a_run_of_another_recipe_is_not_touched(recipe_file, tmp_path):
    recipe, run_dir = read_recipe(str(recipe_file), QUICK), RunDir(tmp_path / "other")
    with pytest.raises(InputError, match="holds a run of another recipe; move it away"):
        begun(recipe, run_dir, recipe_text=recipe.to_yaml().replace("num_steps: 2", "num_steps: 9"), environment=True)
    assert (run_dir.path / RECIPE).exists()


def test_the_digest_is_that_of_the_weights(tokenizer):
    model = make_llama(len(tokenizer), layers=1)
    assert _digest(model) == _digest(copy.deepcopy(model))
    assert _digest(model) != _digest(make_llama(len(tokenizer), layers=1, seed=1))
    assert len(_digest(model.bfloat16())) == 12


@dataclass(frozen=True)
class Setup:
    validation: list | None
    test: list


def test_images_set_aside_take_the_place_of_the_test_images():
    said = []
    assert _on_validation(Setup([1, 2], [3, 4, 5]), said.append) == Setup([1, 2], [1, 2])
    assert _on_validation(Setup(None, [3]), said.append) == Setup(None, [3])
    assert "the 2 images set aside" in said[0] and "set data.num_validation above 0" in said[1]
