"""Whole runs through the command line in processes of their own: interrupted, killed, resumed, repeated."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from abkd import InputError, cli, config
from abkd.calibrations import CALIBRATIONS, MLKD, Plain
from abkd.divergences import KINDS, AlphaBeta, AlphaBetaSchedule, Ramp
from abkd.parts import make_calibration, make_divergence
from abkd.rundir import RunDir


def command(*arguments):
    return [sys.executable, "-m", "abkd", *map(str, arguments)]


def run(*arguments):
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def stop_after(lines, number, run_dir, *arguments):
    """Starts `abkd train`, sends the signal when metrics.jsonl has so many lines; (exit code, what it printed)."""
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics = run_dir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= lines):
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate()
    return process.returncode, output


def student(run_dir):
    return load_file(run_dir / "student" / "model.safetensors")


def steps(run_dir):
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_killed_and_then_interrupted_goes_on_to_the_same_student(recipe_file, tmp_path, capsys):
    options = ["training.num_steps=160", "training.save_every=20"]
    whole, run_dir = tmp_path / "whole", tmp_path / "stopped"
    done = run("train", recipe_file, *options, f"run_dir={whole}")
    assert done.returncode == 0, done.stderr

    stop_after(45, signal.SIGKILL, run_dir, "train", recipe_file, *options, f"run_dir={run_dir}")
    assert not (run_dir / "student").exists()
    assert cli.main(["train", str(recipe_file), *options, f"run_dir={run_dir}"]) == 2
    assert "exists and is never written over" in capsys.readouterr().err

    resume = ["train", run_dir / "recipe.yaml", "resume=true"]
    code, output = stop_after(100, signal.SIGINT, run_dir, *resume)
    assert code == 130 and "Traceback" not in output
    assert "going on from" in output and f"go on with: abkd train {run_dir / 'recipe.yaml'} resume=true" in output
    assert not (run_dir / "student").exists()

    resumed = run(*resume)
    assert resumed.returncode == 0, resumed.stderr
    expected, found = student(whole), student(run_dir)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert steps(run_dir) == steps(whole) == list(range(1, 161))
    assert cli.main([str(argument) for argument in resume]) == 0
    assert "finished already" in capsys.readouterr().out


KILLED_WHILE_SAVING = """
import os, signal, sys
from transformers import Trainer
from abkd import cli
write = Trainer._save_optimizer_and_scheduler
def killed(trainer, folder):
    write(trainer, folder)
    if trainer.state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
Trainer._save_optimizer_and_scheduler = killed
cli.main(sys.argv[1:])
"""


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(recipe_file, tmp_path, capsys):
    options = ["training.num_steps=8", "training.save_every=2"]
    whole, run_dir = RunDir(tmp_path / "whole"), RunDir(tmp_path / "killed")
    arguments = ["train", str(recipe_file), *options, f"run_dir={run_dir.path}"]
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, *arguments], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert run_dir.checkpoint(6).exists() and run_dir.whole_checkpoints()[-1] == run_dir.checkpoint(4)
    assert cli.main(["train", str(recipe_file), *options, f"run_dir={whole.path}"]) == 0
    capsys.readouterr()
    assert cli.main(["train", str(run_dir.path / "recipe.yaml"), "resume=true"]) == 0
    assert f"going on from {run_dir.checkpoint(4)}" in capsys.readouterr().out
    expected = student(whole.path)
    assert all(torch.equal(expected[name], tensor) for name, tensor in student(run_dir.path).items())
    assert run_dir.whole_checkpoints() == [run_dir.checkpoint(6), run_dir.checkpoint(8)]


def test_a_torn_checkpoint_does_not_count_among_those_that_are_kept(recipe_file, tmp_path):
    """Killed while it saved step 6, resumed at 4, interrupted at 5: 4 must stay until 5 is whole."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.create("")
    for step in (2, 4, 6):
        run_dir.checkpoint(step).mkdir(parents=True)
        if step < 6:
            (run_dir.checkpoint(step) / "WHOLE").touch()
    run_dir.drop_torn_checkpoints()
    assert sorted(run_dir.checkpoints.iterdir()) == [run_dir.checkpoint(2), run_dir.checkpoint(4)]


@pytest.mark.parametrize("metric, choose", [("forward_kl", min), ("token_agreement", max)])
def test_the_best_checkpoint_is_kept_and_is_the_student(recipe_file, tmp_path, metric, choose):
    """A learning rate far too high: the last step is not the best one."""
    options = ["training.num_steps=7", "training.validate_every=2", f"training.keep_best={metric}",
               "training.learning_rate=1.0", "training.schedule=constant"]  # fmt: skip
    assert cli.main(["train", str(recipe_file), *options]) == 0
    run_dir = RunDir(tmp_path / "run")
    found = {r["step"]: r[f"validation_{metric}"] for r in run_dir.read_metrics() if f"validation_{metric}" in r}
    assert sorted(found) == [2, 4, 6, 7]
    best = choose(found, key=found.get)
    assert best < 7
    results = run_dir.read_results()
    assert results["student_step"] == best and results["num_steps"] == 7
    assert results["after"][metric] == pytest.approx(found[best], rel=1e-5)
    assert {best, 6, 7} <= {int(folder.name.split("-")[1]) for folder in run_dir.whole_checkpoints()}
    assert len(run_dir.whole_checkpoints()) == 3
    kept = load_file(run_dir.checkpoint(best) / "model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in student(run_dir.path).items())

    moved = RunDir(tmp_path / "moved")  # and stopped before it wrote its student
    shutil.move(run_dir.path, moved.path)
    shutil.rmtree(moved.student)
    (moved.path / "results.json").unlink()
    recipe = (moved.path / "recipe.yaml").read_text().replace(str(run_dir.path), str(moved.path))
    (moved.path / "recipe.yaml").write_text(recipe)
    assert cli.main(["train", str(moved.path / "recipe.yaml"), "resume=true"]) == 0
    assert moved.read_results()["student_step"] == best
    assert all(torch.equal(kept[name], tensor) for name, tensor in student(moved.path).items())


def test_the_model_card_says_what_came_out_and_how_to_repeat_it(recipe_file, tmp_path):
    from huggingface_hub import ModelCard

    assert cli.main(["train", str(recipe_file)]) == 0
    card = ModelCard.load(tmp_path / "run" / "student" / "README.md")
    assert card.data.library_name == "transformers" and card.data.tags == ["abkd", "distillation"]
    assert card.data.base_model is None and card.data.datasets is None  # neither is on a hub
    results = RunDir(tmp_path / "run").read_results()
    assert f"| after | {results['after']['forward_kl']:.3f} |" in card.text
    assert "under AlphaBeta(alpha=0.2, beta=0.7)" in card.text and "for 4 steps." in card.text
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert f"```yaml\n{recipe}```" in card.text and "abkd train recipe.yaml run_dir=" in card.text


def test_a_run_stopped_while_it_measures_keeps_its_student(recipe_file, tmp_path):
    run_dir = RunDir(tmp_path / "run")
    assert cli.main(["train", str(recipe_file)]) == 0
    results = run_dir.read_results()
    (run_dir.path / "results.json").unlink()
    assert cli.main(["train", str(run_dir.path / "recipe.yaml"), "resume=true"]) == 0
    again = run_dir.read_results()
    assert again["after"]["forward_kl"] == pytest.approx(results["after"]["forward_kl"], rel=1e-6)
    assert again["before"] == results["before"] and again["num_steps"] == results["num_steps"] == 4


def test_a_run_stopped_at_its_last_checkpoint_takes_no_step_more(recipe_file, tmp_path):
    """5 steps of 2 in epochs of 4 steps: the last checkpoint is in the middle of an epoch."""
    run_dir = RunDir(tmp_path / "run")
    assert cli.main(["train", str(recipe_file), "training.num_steps=5", "training.save_every=1"]) == 0
    expected = student(run_dir.path)
    shutil.rmtree(run_dir.student)
    (run_dir.path / "results.json").unlink()
    assert cli.main(["train", str(run_dir.path / "recipe.yaml"), "resume=true"]) == 0
    assert all(torch.equal(expected[name], tensor) for name, tensor in student(run_dir.path).items())
    assert steps(run_dir.path) == [1, 2, 3, 4, 5]


def test_a_disk_that_is_too_small_is_refused_before_training(recipe_file, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    assert cli.main(["train", str(recipe_file)]) == 2
    assert "GiB are free; free some, or give another folder with run_dir=PATH" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tokenizers_that_differ_are_refused(recipe_file, tmp_path, capsys):
    from conftest import make_llama, make_tokenizer

    other = make_tokenizer(corpus=["quite other words here and there"])
    folder = tmp_path / "student"
    make_llama(len(other), layers=1).save_pretrained(folder)
    other.save_pretrained(folder)
    overrides = ["student.kind=pretrained", f"student.path={folder}"]
    assert cli.main(["train", str(recipe_file), *overrides]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "different tokenizers" in error and "to the student" in error


def test_a_pretrained_student_of_the_family_trains(recipe_file, teacher_folder, tokenizer, tmp_path):
    from conftest import make_gpt2

    folder = tmp_path / "student"
    make_gpt2(len(tokenizer), layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    overrides = [
        "student.kind=pretrained",
        f"student.path={folder}",
        "evaluation.num_generated=2",
        "teacher.remember=true",
    ]
    assert cli.main(["train", str(recipe_file), *overrides, "objective.ce_weight=0.5"]) == 0
    results = RunDir(tmp_path / "run").read_results()
    assert results["teacher"]["token_agreement"] == 1
    assert len(results["after"]["answers"]) == 2 and 0 <= results["after"]["rouge_l"] <= 100
    assert results["after"]["num_parameters"] < results["teacher"]["num_parameters"]


def test_a_run_with_a_corpus_learns_it_and_resumes(recipe_file, tmp_path, capsys):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("The cat likes milk, and the dog likes rain. " * 40, encoding="utf-8")
    options = [f"data.corpus={corpus}", "data.corpus_tokens=16", "objective.lm_weight=1", "training.save_every=2"]
    options += ["training.num_steps=6", "training.learning_rate=1e-2"]
    assert cli.main(["train", str(recipe_file), *options]) == cli.DONE
    assert "corpus: 12 blocks of 16 tokens, 0 tokens left over" in capsys.readouterr().out
    lines = [line["lm"] for line in RunDir(tmp_path / "run").read_metrics() if "lm" in line]
    assert len(lines) == 6 and lines[-1] < lines[0]
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    again = RunDir(tmp_path / "again")
    for path in (again.student, again.checkpoints / "checkpoint-6"):
        shutil.rmtree(path)
    (again.path / "results.json").unlink()
    recipe = again.path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(tmp_path / "run"), str(again.path)))
    assert cli.main(["train", str(recipe), "resume=true"]) == cli.DONE
    assert [line["lm"] for line in again.read_metrics() if "lm" in line] == lines


@pytest.mark.parametrize("kind", ["on_policy", "mixed", "adaptive"])
def test_a_run_with_rollouts_logs_what_it_sampled(recipe_file, tmp_path, kind):
    options = [f"rollouts.kind={kind}", "rollouts.max_new_tokens=5", "training.validate_every=2"]
    options += ["rollouts.threshold=1"] if kind == "adaptive" else []
    assert cli.main(["train", str(recipe_file), *options]) == cli.DONE
    lines = [line for line in RunDir(tmp_path / "run").read_metrics() if "loss" in line]
    sampled = [line["num_sampled"] for line in lines]
    assert sampled == [2, 2, 2, 2] if kind != "mixed" else set(sampled) <= {0, 2}
    assert all(1 <= line["sampled_tokens"] <= 5 for line in lines if line["num_sampled"])
    assert all(("threshold" in line) == (kind == "adaptive") for line in lines)


@pytest.mark.parametrize(
    "options, field",
    [
        (["evaluation.num_generated=1", "evaluation.max_new_tokens=250"], "evaluation.max_new_tokens"),
        (["rollouts.kind=on_policy", "rollouts.max_new_tokens=250"], "rollouts.max_new_tokens"),
    ],
)
def test_texts_longer_than_the_models_context_are_refused_before_training(recipe_file, capsys, options, field):
    assert cli.main(["train", str(recipe_file), *options]) == cli.USERS_MISTAKE
    err = capsys.readouterr().err
    assert err.startswith(f"abkd: {field}: the longest text has 2") and f"256 positions; lower {field}" in err


def test_a_packed_run_comes_to_the_same_student(recipe_file, tmp_path):
    run_dirs = [tmp_path / "padded", tmp_path / "packed"]
    for run_dir in run_dirs:
        pack = f"training.pack={str(run_dir.name == 'packed').lower()}"
        assert cli.main(["train", str(recipe_file), pack, "training.batch_size=4", f"run_dir={run_dir}"]) == 0
    padded, packed = map(student, run_dirs)
    assert all(torch.allclose(padded[name], packed[name], atol=1e-5) for name in padded)


def test_a_step_of_another_recipe_cannot_resume_a_run(recipe_file):
    assert cli.main(["train", str(recipe_file)]) == 0
    with pytest.raises(InputError, match="was started with 'num_steps: 4', not 'num_steps: 5'"):
        from abkd.inputs import check_inputs
        from abkd.recipe import read_recipe

        check_inputs(read_recipe(str(recipe_file), ["training.num_steps=5", "resume=true"]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_section_without_parameters_makes_the_divergence_without_parameters(kind):
    assert make_divergence(TypeAdapter(config.Divergence).validate_python({"kind": kind})) == KINDS[kind]()


def test_a_ramp_in_the_recipe_makes_a_schedule():
    section = {"kind": "alpha_beta", "alpha": {"from": 0.8, "to": 0.2, "shape": "cosine"}}
    made = make_divergence(TypeAdapter(config.Divergence).validate_python(section))
    assert made == AlphaBetaSchedule(Ramp(0.8, 0.2, "cosine"), 0.7)


@pytest.mark.parametrize("kind", sorted(set(CALIBRATIONS) - {"plain"}))
def test_every_calibration_of_the_table_is_made_with_its_defaults(kind):
    section = config.Objective.model_validate({"calibration": {"kind": kind}})
    assert make_calibration(section) == CALIBRATIONS[kind]()


def test_a_divergence_makes_a_plain_calibration_with_the_temperatures():
    section = config.Objective(divergence={"kind": "alpha_beta"}, temperature=2.0, temperature_gradient_scale="squared")
    assert make_calibration(section) == Plain(AlphaBeta(), 2.0, temperature_gradient_scale="squared")


def test_a_calibration_holds_its_divergence_and_a_schedule_too():
    ramp = {"kind": "alpha_beta", "alpha": {"from": 0.8, "to": 0.2}}
    section = config.Objective.model_validate(
        {"calibration": {"kind": "mlkd", "divergence": ramp, "temperatures": [2]}}
    )
    assert make_calibration(section) == MLKD(AlphaBetaSchedule(Ramp(0.8, 0.2), 0.7), (2.0,))
