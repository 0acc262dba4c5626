"""Image classifiers in two processes of torchrun: one student, every image counted, and a run that resumes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_image_run import CLASSES, make_images, write_image_recipe
from test_launch import launch
from torch import nn
from transformers import TrainingArguments

from abkd import AlphaBeta, Objective, cli, ranks
from abkd.data.images import Augmentation, ImageStore
from abkd.data.labelled_images import LabelledImages
from abkd.models.classifiers import load_classifier, save_classifier
from abkd.rundir import RunDir
from abkd.teachers.classifier import ClassifierTeacher
from abkd.trainer import ImageDistillationTrainer

HERE = Path(__file__)
NUM_TRAIN, BATCH_SIZE, NUM_STEPS = 60, 20, 4  # 2 steps an epoch of 2 x 20: the last one takes 20 images again


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """(folder of the runs, what each rank's student held after `cli.main` of each case)."""
    folder = tmp_path_factory.mktemp("image_launch")
    for name, num, seed in (("train", NUM_TRAIN, 0), ("test", 30, 1)):
        images, labels = make_images(num, seed)
        np.savez(folder / f"{name}.npz", images=images, labels=labels, classes=CLASSES)
    half = (0.5, 0.5, 0.5)
    made = load_classifier(kind="cifar", name="resnet8", num_classes=3, classes=CLASSES, mean=half, std=half, seed=5)
    save_classifier(made, folder / "teacher")
    write_image_recipe(folder, folder, folder / "teacher")
    done = subprocess.run(launch(HERE, folder), capture_output=True, text=True, cwd=HERE.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder, [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def cases(folder):
    """Name -> arguments of the command line."""
    recipe, often = str(folder / "recipe.yaml"), "evaluation.batch_size=8"  # 4 batches of the 30 test images
    return {
        "whole": ["train", recipe, often, "training.validate_every_epochs=1", f"run_dir={folder / 'whole'}"],
        "stopped": ["train", recipe, often, "training.validate_every_epochs=1", f"run_dir={folder / 'stopped'}"],
        "resumed": ["train", str(folder / "stopped" / "recipe.yaml"), "resume=true"],
    }


def test_both_ranks_end_with_the_student_that_is_saved(launched):
    folder, (first, second) = launched
    assert first["whole"]["code"] == second["whole"]["code"] == 0
    saved = load_file(folder / "whole/student/model.safetensors")
    for rank in (first, second):
        held = {name.removeprefix("network."): tensor for name, tensor in rank["whole"]["state"].items()}
        assert held.keys() == saved.keys()
        assert [name for name in saved if not torch.equal(saved[name], held[name])] == []  # running means too


def test_results_of_two_ranks_are_those_of_one(launched, capsys):
    folder, _ = launched
    assert cli.main(["eval", str(folder / "whole"), "--json"]) == 0
    alone, results = json.loads(capsys.readouterr().out), RunDir(folder / "whole").read_results()
    for row, measured in (("after", alone["student"]), ("before", alone["before"]), ("teacher", alone["teacher"])):
        assert results[row]["num_images"] == 30
        for name in ("top1", "cross_entropy", "forward_kl", "alpha_beta", "entropy"):
            assert results[row][name] == pytest.approx(measured[name], rel=1e-6, abs=1e-9), (row, name)
    last = [line for line in RunDir(folder / "whole").read_metrics() if "validation_top1" in line][-1]
    assert last["step"] == NUM_STEPS and last["validation_alpha_beta"] == results["after"]["alpha_beta"]


def test_the_log_counts_the_images_of_both_ranks(launched):
    folder, _ = launched
    steps = [line for line in RunDir(folder / "whole").read_metrics() if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, NUM_STEPS + 1))
    assert [line["num_images"] for line in steps] == [2 * BATCH_SIZE] * NUM_STEPS
    assert [line["epoch"] for line in steps] == [0.5, 1.0, 1.5, 2.0]
    for line in steps:
        assert line["loss"] == pytest.approx(line["kd"] + line["ce"], rel=1e-4)


def test_a_signal_to_one_rank_stops_both_and_they_go_on_to_the_same_student(launched):
    folder, of_ranks = launched
    assert [rank["stopped"]["code"] for rank in of_ranks] == [cli.INTERRUPTED] * 2
    assert [rank["resumed"]["code"] for rank in of_ranks] == [cli.DONE] * 2
    whole, resumed = (load_file(folder / run / "student/model.safetensors") for run in ("whole", "stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    whole, resumed = (RunDir(folder / run).read_results() for run in ("whole", "stopped"))
    assert resumed["after"] == whole["after"] and resumed["num_steps"] == NUM_STEPS


def test_two_ranks_take_the_steps_of_one_with_the_doubled_batch(launched, tmp_path):
    _, (first, second) = launched
    alone = train_linear(tmp_path, batch_size=2 * BATCH_SIZE)
    assert torch.equal(first["linear"], second["linear"])
    torch.testing.assert_close(first["linear"], alone, rtol=1e-5, atol=1e-6)


def train_linear(folder, *, batch_size):
    """The weights of a student without batch norm, whose loss is of single images, after 4 steps on 80 images."""
    images, labels = make_images(80, 3)
    store = ImageStore(LabelledImages(images, labels, CLASSES))
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(nn.Sequential(nn.Flatten(), nn.Linear(images[0].size, len(CLASSES))))
    args = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=batch_size, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    ImageDistillationTrainer(
        model=models[0],
        args=args,
        teacher=ClassifierTeacher(models[1]),
        objective=Objective(AlphaBeta(0.8, 0.3), ce_weight=1.0),
        train_images=store,
        validation_images=store,
        augmentation=Augmentation(crop_padding=1),
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        rate_factor=lambda epoch: 1.0,
    ).train()
    return models[0][1].weight.detach()


def main(folder: str) -> None:
    torch.set_num_threads(1)
    ranks.join(on_cpu=True)
    ranks.leave = lambda: None  # one group for all cases
    step, train = ImageDistillationTrainer.training_step, ImageDistillationTrainer.train
    found, trainers = {}, []

    def interrupted(trainer, *arguments):
        if trainer.state.global_step == 1 and ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments)

    def kept(trainer, **options):
        trainers.append(trainer)
        train(trainer, **options)

    ImageDistillationTrainer.train = kept
    for case, arguments in cases(Path(folder)).items():
        ImageDistillationTrainer.training_step = interrupted if case == "stopped" else step
        code = cli.main(arguments)
        found[case] = {"code": code, "state": trainers[-1].model.state_dict()}
    ImageDistillationTrainer.train = train
    found["linear"] = train_linear(Path(folder) / "linear", batch_size=BATCH_SIZE)
    torch.save(found, Path(folder) / f"rank{ranks.rank()}.pt")
    ranks.gather(0)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
