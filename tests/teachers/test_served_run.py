"""Whole trainings with a teacher behind HTTP, through the command line."""

import json

import pytest
from conftest import make_llama
from stand_in import StandIn

from abkd import cli
from abkd.teachers import connection

K = 290  # every class: the run must be that of the teacher in this process


@pytest.fixture
def server(tokenizer, monkeypatch):
    monkeypatch.setattr(connection, "_FIRST_PAUSE_S", 0.02)
    with StandIn("vllm", make_llama(len(tokenizer)), tokenizer) as stand_in:
        yield stand_in


def served(server, teacher_folder, **changes):
    fields = {"kind": "served", "url": server.url, "model": "tiny", "k": K, "tail": "uniform", "patience_s": 0.3}
    section = [f"teacher.{name}={value}" for name, value in (fields | changes).items()]
    return [*section, f"student.path={teacher_folder}"]


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_run_is_that_of_the_teacher_in_this_process(recipe_file, server, teacher_folder, tmp_path):
    near, far = tmp_path / "near", tmp_path / "far"
    assert cli.main(["train", str(recipe_file), f"run_dir={near}"]) == cli.DONE
    assert cli.main(["train", str(recipe_file), f"run_dir={far}", *served(server, teacher_folder)]) == cli.DONE
    assert losses(far) == pytest.approx(losses(near), rel=1e-4) and len(losses(far)) == 4
    results = json.loads((far / "results.json").read_text())
    assert "teacher" not in results and results["after"]["forward_kl"] > 0


def test_a_run_whose_server_dies_keeps_its_steps_and_goes_on(
    recipe_file, server, teacher_folder, tmp_path, capsys, monkeypatch
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    section = served(server, teacher_folder)
    assert cli.main(["train", str(recipe_file), f"run_dir={whole}", *section]) == cli.DONE
    monkeypatch.setenv("ABKD_API_KEY", "sk-secret")
    drop_at(server, monkeypatch, step=3)
    assert cli.main(["train", str(recipe_file), f"run_dir={broken}", *section]) == cli.USERS_MISTAKE
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "does not answer" in said
    assert said.endswith(f"; start it again, then go on with: abkd train {broken}/recipe.yaml resume=true")
    assert [folder.name for folder in (broken / "checkpoints").iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    server.troubles.clear()
    monkeypatch.setattr(connection, "_FIRST_PAUSE_S", 0.02)
    assert cli.main(["train", f"{broken}/recipe.yaml", "resume=true"]) == cli.DONE
    assert losses(broken) == pytest.approx(losses(whole), rel=1e-5)
    written = "".join(
        file.read_text() for file in broken.rglob("*") if file.suffix in (".yaml", ".json", ".jsonl", ".md")
    )
    assert "sk-secret" not in written


def drop_at(server, monkeypatch, step):
    """From this step on the server drops every connection."""
    from abkd.trainer import DistillationTrainer

    take = DistillationTrainer.loss_of

    def loss_of(trainer, *arguments):
        if trainer.state.global_step + 1 == step:
            server.troubles.extend(["drop"] * 1000)
        return take(trainer, *arguments)

    monkeypatch.setattr(DistillationTrainer, "loss_of", loss_of)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "large"}, "serves tiny, not large; set teacher.model to one of them"),
        ({"k": 291}, "teacher.k must lie between 1 and the teacher's 290 classes, got 291"),
        ({"url": "http://127.0.0.1:9"}, "; start it, or correct the url"),
    ],
)
def test_what_a_server_cannot_do_is_one_line_before_the_training(
    recipe_file, server, teacher_folder, capsys, changes, message
):
    assert cli.main(["train", str(recipe_file), *served(server, teacher_folder, **changes)]) == cli.USERS_MISTAKE
    *_, said = capsys.readouterr().err.strip().splitlines()
    assert message in said and not (recipe_file.parent / "run").exists()


def test_a_cache_is_written_from_a_server(recipe_file, server, teacher_folder, tmp_path):
    cache, near, far = (tmp_path / name for name in ("cache", "near", "far"))
    section = served(server, teacher_folder, k=20)
    assert cli.main(["cache", str(recipe_file), "--output", str(cache), *section]) == cli.DONE
    assert cli.main(["train", str(recipe_file), f"run_dir={near}", *section]) == cli.DONE
    cached = ["teacher.kind=cached", f"teacher.path={cache}", "teacher.tail=uniform", f"student.path={teacher_folder}"]
    assert cli.main(["train", str(recipe_file), f"run_dir={far}", *cached]) == cli.DONE
    assert losses(far) == pytest.approx(losses(near), rel=0.02)


def test_a_mixture_of_the_same_teacher_here_and_there_is_that_teacher(recipe_file, server, teacher_folder, tmp_path):
    near, mixed = tmp_path / "near", tmp_path / "mixed"
    there = f"{{kind: served, url: '{server.url}', model: tiny, k: {K}, tail: uniform}}"
    section = ["teacher.kind=mixture", f"teacher.teachers=[{{path: '{teacher_folder}'}}, {there}]"]
    assert cli.main(["train", str(recipe_file), f"run_dir={near}"]) == cli.DONE
    mixture = [*section, "teacher.weights=[1, 3]", f"student.path={teacher_folder}"]
    assert cli.main(["train", str(recipe_file), f"run_dir={mixed}", *mixture]) == cli.DONE
    assert losses(mixed) == pytest.approx(losses(near), rel=1e-4)


def test_a_cache_whose_server_dies_keeps_its_shards_and_goes_on(recipe_file, server, teacher_folder, tmp_path, capsys):
    section = served(server, teacher_folder, k=20, num_connections=1)
    command = ["cache", str(recipe_file), "--output", str(tmp_path / "cache"), "--shard-tokens=1", "--batch-size=1"]
    server.troubles.extend([0.0] * 8 + ["drop"] * 1000)
    assert cli.main([*command, *section]) == cli.USERS_MISTAKE
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith("; start it again, then go on with the same command; whole shards are kept")
    assert len(list((tmp_path / "cache").glob("shard-*.safetensors"))) > 0
    server.troubles.clear()
    assert cli.main([*command, *section]) == cli.DONE
    assert "going on: " in capsys.readouterr().out


def test_a_run_goes_on_with_a_server_that_has_moved(
    recipe_file, server, teacher_folder, tmp_path, monkeypatch, tokenizer
):
    run = tmp_path / "run"
    drop_at(server, monkeypatch, step=3)
    assert cli.main(["train", str(recipe_file), f"run_dir={run}", *served(server, teacher_folder)]) == cli.USERS_MISTAKE
    monkeypatch.undo()
    with StandIn("vllm", make_llama(len(tokenizer)), tokenizer) as elsewhere:
        again = [
            "train",
            f"{run}/recipe.yaml",
            "resume=true",
            f"teacher.url={elsewhere.url}",
            "teacher.num_connections=2",
        ]
        assert cli.main(again) == cli.DONE
        assert cli.main(["train", f"{run}/recipe.yaml", "resume=true", "teacher.k=5"]) == cli.USERS_MISTAKE
    assert len(losses(run)) == 4


def test_what_a_run_measures_against_a_server_says_that_it_is_approximate(recipe_file, server, teacher_folder, capsys):
    assert cli.main(["train", str(recipe_file), *served(server, teacher_folder, k=20)]) == cli.DONE
    results = json.loads((recipe_file.parent / "run/results.json").read_text())
    assert results["after"]["teacher_known_by"] == "the 20 likeliest classes, tail=uniform"
    assert "rank_mass" not in results["after"]
    assert "rows are not whole (the 20 likeliest classes, tail=uniform)" in " ".join(capsys.readouterr().out.split())
