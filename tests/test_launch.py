"""The whole command line in two processes of torchrun: one voice, one run folder, the results of one process."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import write_recipe
from safetensors.torch import load_file

from abkd import InputError, cli, ranks
from abkd.config import Training
from abkd.engine import check_engine, check_launcher
from abkd.rundir import RunDir

HERE = Path(__file__)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
KEEP_BEST = ["training.validate_every=2", "training.keep_best=forward_kl", "training.num_steps=5"]
GENERATING = ["evaluation.num_generated=3", "evaluation.max_new_tokens=5", "student.lora={rank: 4}"]
SAME = "step", "loss", "kd", "ce", "num_tokens", "grad_norm", "learning_rate", "epoch"
"""Figures of a step; entropies and the like are of a few rows of each rank."""
LONG = ["training.num_steps=12", "training.save_every=4"]


def launch(*arguments):
    return [*TORCHRUN, *map(str, arguments)]


@pytest.fixture(scope="module")
def launched(tmp_path_factory, teacher_folder, data_file):
    """(the folder of the recipe and of the runs, case -> what each rank returned and printed), as `main` made them."""
    folder = tmp_path_factory.mktemp("launch")
    write_recipe(folder, teacher_folder, data_file)
    (folder / "taken").mkdir()
    kill_one(launch("-m", "abkd", *cases(folder)["killed"]), RunDir(folder / "killed"))
    done = subprocess.run(launch(HERE, folder), capture_output=True, text=True, cwd=HERE.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def kill_one(command, run_dir):
    """Starts a launch, and kills one of its processes when there is a checkpoint."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=HERE.parent.parent)
    while process.poll() is None and not run_dir.whole_checkpoints():
        time.sleep(0.01)
    os.kill(next(children(process.pid)), signal.SIGKILL)
    assert process.wait() != 0 and not run_dir.student.exists()


def cases(folder):
    """Name -> arguments of the command line."""
    recipe = str(folder / "recipe.yaml")

    def train(name, *options):
        return ["train", recipe, *options, f"run_dir={folder / name}"]

    return {
        "best": train("best", *KEEP_BEST, *GENERATING),
        "taken": train("taken"),
        "unequal": train("unequal", "data.max_prompt_tokens=2"),
        "stopped": train("stopped", *LONG),
        "resumed": ["train", str(folder / "stopped" / "recipe.yaml"), "resume=true"],
        "killed": train("killed", *LONG),
        "killed, resumed": ["train", str(folder / "killed" / "recipe.yaml"), "resume=true"],
        "whole": train("whole", *LONG),
        "measured": ["eval", str(folder / "best"), "--json"],
        "diverges": train("diverges"),
    }


def weights(run_dir):
    return load_file(run_dir / "student" / "model.safetensors")


def test_two_processes_give_the_results_of_one_with_the_doubled_batch(launched, tmp_path):
    folder, (first, second) = launched
    assert first["best"]["code"] == second["best"]["code"] == 0
    options = [*KEEP_BEST, *GENERATING, "training.batch_size=4", f"run_dir={tmp_path / 'alone'}"]
    assert cli.main(["train", str(folder / "recipe.yaml"), *options]) == 0
    runs = [RunDir(folder / "best"), RunDir(tmp_path / "alone")]
    ours, alone = [weights(run.path) for run in runs]
    assert ours.keys() == alone.keys()
    for name in alone:
        torch.testing.assert_close(ours[name], alone[name], rtol=1e-4, atol=1e-6)
    ours, alone = [run.read_results() for run in runs]
    for row in ("teacher", "before", "after"):
        assert ours[row].pop("rank_mass")["student"] == pytest.approx(alone[row].pop("rank_mass")["student"], rel=1e-4)
        for key in ("questions", "answers"):
            assert ours[row].pop(key) == alone[row].pop(key)
        assert ours[row] == pytest.approx(alone[row], rel=1e-4)
    assert ours["student_step"] == alone["student_step"] in (2, 4, 5)
    ours, alone = [[line for line in run.read_metrics() if "warning" not in line] for run in runs]
    assert len(ours) == len(alone) == 8
    for line, other in zip(ours, alone, strict=True):
        same = [name for name in line if name in SAME or name.startswith("validation_")]
        assert len(same) >= 6
        assert {name: line[name] for name in same} == pytest.approx({name: other[name] for name in same}, rel=1e-3)


def test_one_process_speaks(launched):
    _, (first, second) = launched
    assert "engine: 2 processes, each with the whole student, on cpu, fp32, 4 examples per step" in first["best"]["out"]
    assert first["best"]["out"].count("the student is in") == 1
    assert second["best"]["out"] == "" and "Traceback" not in first["best"]["err"]
    assert json.loads(first["measured"]["out"])["student"]["num_tokens"] > 0 and second["measured"]["out"] == ""


@pytest.mark.parametrize(
    "case, line",
    [
        ("taken", "exists and is never written over"),
        ("unequal", "the prompt is 15 tokens"),
        ("diverges", "the loss is nan at step 2"),
    ],
)
def test_a_mistake_is_told_once_and_ends_every_process(launched, case, line):
    _, ranks_of_case = launched
    printed = [rank[case]["err"] for rank in ranks_of_case]
    assert [rank[case]["code"] for rank in ranks_of_case] == [2, 2]
    told = [text for text in "".join(printed).splitlines() if text.startswith("abkd: ")]
    assert len(told) == 1 and line in told[0]


def test_a_signal_to_one_process_stops_all_after_the_same_step(launched):
    folder, ranks_of_case = launched
    assert [rank["stopped"]["code"] for rank in ranks_of_case] == [130, 130]
    assert [rank["resumed"]["code"] for rank in ranks_of_case] == [0, 0]
    assert "going on from" in ranks_of_case[0]["resumed"]["out"]
    assert "checkpoint-6" in ranks_of_case[0]["resumed"]["out"]
    expected = weights(folder / "whole")
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(folder / "stopped").items())


def test_another_number_of_processes_cannot_resume_a_run(launched, capsys):
    folder, _ = launched
    (folder / "whole" / "results.json").rename(folder / "whole" / "away.json")
    assert cli.main(["train", str(folder / "whole" / "recipe.yaml"), "resume=true"]) == 2
    (folder / "whole" / "away.json").rename(folder / "whole" / "results.json")
    assert "was started with 2 processes, this is 1" in capsys.readouterr().err


def test_two_processes_killed_go_on_to_the_same_student(launched):
    folder, ranks_of_case = launched
    assert [rank["killed, resumed"]["code"] for rank in ranks_of_case] == [0, 0]
    assert "going on from" in ranks_of_case[0]["killed, resumed"]["out"]
    expected = weights(folder / "whole")
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(folder / "killed").items())


def children(pid):
    """Of a process, those of it that live."""
    return map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


LAUNCHES = {
    "ACCELERATE_USE_FSDP": ({"ACCELERATE_USE_FSDP": "true"}, "set training.engine=fsdp2 in the recipe"),
    "ACCELERATE_USE_DEEPSPEED": ({"ACCELERATE_USE_DEEPSPEED": "true"}, "set training.engine=zero2 in the recipe"),
    "accelerate launch --cpu": (
        {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "starts one process, however many it is asked for"
    ),
    "WORLD_SIZE": ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK and LOCAL_RANK"),
    "precision": ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "and training.precision=fp32 differ"),
    "accumulation": ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "and training.accumulation=1 differ"),
    "compile": ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "is not supported"),
    "cpu": ({"ACCELERATE_USE_CPU": "True"}, "set training.device=cpu"),
}  # fmt: skip


@pytest.mark.parametrize("case", LAUNCHES)
def test_a_launch_that_would_be_ignored_is_refused_in_one_line(case, recipe_file, monkeypatch, capsys):
    variables, line = LAUNCHES[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", str(recipe_file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("abkd: launch: ") and line in error and error.count("\n") == 1


def test_what_accelerate_launch_always_says_is_no_reason_to_refuse(monkeypatch):
    for name, value in {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "USE_CPU": "False"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    check_launcher(Training(num_steps=1, learning_rate=1.0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="they are refused where there is no GPU")
@pytest.mark.parametrize(
    "options, line",
    [
        ({"engine": "fsdp2"}, "training.engine: fsdp2 needs GPUs, and on a CPU it would be ignored"),
        ({"engine": "zero2"}, "training.engine: zero2 needs GPUs, and on a CPU it would be ignored"),
        ({"precision": "fp16"}, "training.precision: fp16 needs a GPU"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(options, line):
    with pytest.raises(InputError, match=line):
        check_engine(Training(num_steps=1, learning_rate=1.0, **options))


def test_an_engine_of_several_processes_is_refused_for_one(monkeypatch):
    monkeypatch.setattr("abkd.engine.device_type", lambda training: "cuda")
    with pytest.raises(InputError, match="shards over processes, and this is one"):
        check_engine(Training(num_steps=1, learning_rate=1.0, engine="fsdp2"))


def test_shares_of_several_ranks_are_as_long_and_make_the_whole(monkeypatch):
    for items in ([], [1], [1, 2, 3, 4, 5]):
        for count in (1, 2, 3):
            parts = []
            for number in range(count):
                monkeypatch.setattr(ranks, "rank", lambda number=number: number)
                monkeypatch.setattr(ranks, "num_ranks", lambda count=count: count)
                parts.append(ranks.share(items))
            assert len({len(part) for part in parts}) == 1
            monkeypatch.setattr(ranks, "gather", lambda value, parts=parts: parts)
            assert ranks.unshared(parts[0], len(items)) == items


def main(folder: str) -> None:
    from torch.distributed.distributed_c10d import _get_default_store

    from abkd.trainer import DistillationTrainer

    torch.set_num_threads(1)
    ranks.join(on_cpu=True)
    ranks.leave = lambda: None  # one group for all cases
    rank, found = ranks.rank(), {}
    step = DistillationTrainer.training_step

    def interrupted(trainer, *arguments):
        if trainer.state.global_step == 5 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments)

    def diverging(trainer, *arguments):
        if trainer.state.global_step == 1 and rank == 1:
            trainer.model.lm_head.weight.data.fill_(float("nan"))
        return step(trainer, *arguments)

    for case, arguments in cases(Path(folder)).items():
        if case == "killed":
            continue
        DistillationTrainer.training_step = {"stopped": interrupted, "diverges": diverging}.get(case, step)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(arguments)
        found[case] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
        Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
        if case == "diverges":  # the last: its processes are out of step, and the other sees that one is gone
            torch.distributed.destroy_process_group()
            time.sleep(3)
        else:
            ranks.gather(0)
            if rank == 0:
                _get_default_store().delete_key("abkd/refused")
            ranks.gather(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
