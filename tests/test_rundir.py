import json
import subprocess
from importlib import metadata

import pytest

from abkd import rundir
from abkd.errors import InputError
from abkd.rundir import RunDir, environment


@pytest.fixture
def run_dir(tmp_path):
    made = RunDir(tmp_path / "deep" / "run")
    made.create("task: language_model\n")
    return made


def test_a_new_run_says_what_was_asked_and_where(run_dir):
    assert (run_dir.path / "recipe.yaml").read_text(encoding="utf-8") == "task: language_model\n"
    written = run_dir.read_json("environment.json")
    assert written["versions"]["torch"] == metadata.version("torch")
    assert written["versions"]["abkd"] == metadata.version("abkd")
    assert written["command"] and written["python"] and written["started"].endswith("+00:00")
    assert sorted(file.name for file in run_dir.path.iterdir()) == ["environment.json", "recipe.yaml"]


@pytest.mark.parametrize("kind", ["a run", "an empty folder", "a file"])
def test_what_exists_is_never_written_over(tmp_path, kind):
    path = tmp_path / "run"
    if kind == "a run":
        RunDir(path).create("first")
    elif kind == "an empty folder":
        path.mkdir()
    else:
        path.write_text("mine", encoding="utf-8")
    before = path.read_text(encoding="utf-8") if path.is_file() else sorted(path.iterdir())
    message = (
        f"run_dir: {str(path)!r} exists and is never written over; "
        "give another with run_dir=PATH, or go on with it by resume=true"
    )
    for action in (RunDir(path).check_new, lambda: RunDir(path).create("second")):
        with pytest.raises(InputError) as caught:
            action()
        assert str(caught.value) == message
    assert before == (path.read_text(encoding="utf-8") if path.is_file() else sorted(path.iterdir()))


def test_metrics_are_one_object_a_line(run_dir):
    for step in (1, 2):
        run_dir.log({"step": step, "loss": 1.5 / step})
    lines = run_dir.metrics.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 1.5}, {"step": 2, "loss": 0.75}]


@pytest.mark.parametrize(("step", "kept"), [(-1, []), (2, [1, 2]), (9, [1, 2, 3])], ids=["none", "some", "all"])
def test_metrics_after_a_checkpoint_and_a_torn_line_are_dropped(run_dir, step, kept):
    for number in (1, 2, 3):
        run_dir.log({"step": number, "loss": 1.0})
    with run_dir.metrics.open("a", encoding="utf-8") as stream:
        stream.write('{"step": 4, "lo')
    run_dir.drop_metrics_after(step)
    run_dir.log({"step": 7})
    records = [json.loads(line) for line in run_dir.metrics.read_text(encoding="utf-8").splitlines()]
    assert [record["step"] for record in records] == [*kept, 7]


def test_dropping_metrics_of_a_run_that_logged_none_makes_no_file(run_dir):
    run_dir.drop_metrics_after(3)
    assert not run_dir.metrics.exists()


def test_only_marked_checkpoints_are_whole_in_order_of_steps(run_dir):
    assert run_dir.whole_checkpoints() == []
    for step, whole in ((100, True), (20, True), (3, False)):
        folder = run_dir.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if whole:
            (folder / "WHOLE").touch()
    assert [folder.name for folder in run_dir.whole_checkpoints()] == ["checkpoint-20", "checkpoint-100"]


def test_results_are_none_until_written_and_never_half_written(run_dir):
    assert run_dir.read_results() is None
    run_dir.write_json("results.json", {"loss": 1.0})
    with pytest.raises(TypeError):
        run_dir.write_json("results.json", {"loss": object()})
    assert run_dir.read_results() == {"loss": 1.0}


def test_a_write_that_fails_leaves_the_old_file(run_dir, monkeypatch):
    run_dir.write_json("results.json", {"loss": 1.0})

    def full_disk(path, text, encoding):
        with path.open("w", encoding=encoding) as stream:
            stream.write(text[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rundir.Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        run_dir.write_json("results.json", {"loss": 2.0})
    monkeypatch.undo()
    assert run_dir.read_results() == {"loss": 1.0}


def test_the_commit_is_that_of_the_checkout_with_a_mark_where_it_was_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "__file__", str(tmp_path / "abkd" / "rundir.py"))
    assert environment()["commit"] is None

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "file").write_text("one", encoding="utf-8")
    git("init")
    git("add", "file")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert environment()["commit"] == head[:12]
    (tmp_path / "file").write_text("two", encoding="utf-8")
    assert environment()["commit"] == head[:12] + "+"
