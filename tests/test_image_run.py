"""Image classifiers through the whole command line: a teacher out of labels, a student out of it, and every mistake."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from abkd import cli
from abkd.rundir import RunDir

SIZE, CLASSES = 12, ("bars", "checks", "plain")


def make_images(num, seed):
    """Three kinds of texture under noise, uint8 `[num, SIZE, SIZE, 3]`, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num) % len(CLASSES)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    textures = np.stack([rows % 4 < 2, (rows + columns) % 2 == 0, np.full((SIZE, SIZE), 0.5)]).astype(float)
    clean = 60 + 120 * textures[labels][..., None]
    return (clean + rng.normal(0, 25, (num, SIZE, SIZE, 3))).clip(0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, num, seed in (("train", 60, 0), ("test", 30, 1)):
        images, labels = make_images(num, seed)
        np.savez(folder / f"{name}.npz", images=images, labels=labels, classes=CLASSES)
    return folder


def write_image_recipe(folder, data, teacher=None):
    """A small valid recipe in `folder`: resnet8, 6 steps of 20 images, run_dir folder/run."""
    weights = "kd_weight: 1, ce_weight: 1, divergence: {kind: alpha_beta, alpha: 0.8, beta: 0.3}, temperature: 4"
    file = folder / "recipe.yaml"
    file.write_text(
        f"""task: image_classification
{f'teacher: {{kind: cifar, path: "{teacher}"}}' if teacher else ""}
student: {{kind: cifar, name: resnet8}}
data: {{train: "{data}/train.npz", test: "{data}/test.npz", augmentation: {{crop_padding: 1}}}}
objective: {{{weights if teacher else "kd_weight: 0, ce_weight: 1"}}}
training: {{num_epochs: 2, batch_size: 20, learning_rate: 0.05, schedule: cosine, log_every: 1}}
run_dir: "{folder / "run"}"
""",
        encoding="utf-8",
    )
    return file


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, data):
    """A resnet8 trained by the command line on the labels alone: its student's folder."""
    folder = tmp_path_factory.mktemp("teacher")
    recipe = write_image_recipe(folder, data)
    assert cli.main(["train", str(recipe), "training.num_epochs=6"]) == cli.DONE
    return folder / "run" / "student"


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_a_teacher_learns_from_labels_alone(teacher):
    results = results_of(teacher.parent)
    assert "teacher" not in results and results["divergence"] is None
    assert results["after"]["top1"] > 0.9 > results["before"]["top1"]
    assert results["after"]["num_images"] == 30 and results["num_steps"] == 18
    card = (teacher / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: image-classification" in card and "| after |" in card


def test_a_student_is_distilled_and_measured(teacher, data, tmp_path, capsys):
    recipe = write_image_recipe(tmp_path, data, teacher)
    assert cli.main(["train", str(recipe), "training.validate_every_epochs=1", "training.num_epochs=4"]) == cli.DONE
    results, log = results_of(tmp_path / "run"), RunDir(tmp_path / "run").read_metrics()
    assert results["teacher"]["agreement"] == 1 and results["teacher"]["forward_kl"] == pytest.approx(0, abs=1e-6)
    assert results["after"]["alpha_beta"] < results["before"]["alpha_beta"]
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert all(line["num_images"] == 20 and line["images_per_s"] > 0 for line in steps)
    assert not any("token" in key for line in steps for key in line)
    assert all(0 < line["mass_misplaced"] < 1 and line["mass_moved"] > 0 for line in steps)
    assert all(line["mass_into_target"] < line["mass_moved"] + 1e-9 for line in steps)
    for line in steps:
        assert line["loss"] == pytest.approx(line["kd"] + line["ce"], rel=1e-4)
    assert [line["step"] for line in log if "validation_top1" in line] == [3, 6, 9, 12]
    rates = [line["learning_rate"] for line in steps]
    assert rates == pytest.approx([0.05 * (1 + np.cos(np.pi * step / 12)) / 2 for step in range(12)])
    assert "Test images" in capsys.readouterr().out


def test_eval_measures_the_saved_student_as_training_did(teacher, data, tmp_path, capsys):
    recipe = write_image_recipe(tmp_path, data, teacher)
    assert cli.main(["train", str(recipe)]) == cli.DONE
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "run"), "--json"]) == cli.DONE
    measured, results = json.loads(capsys.readouterr().out), results_of(tmp_path / "run")
    assert measured["student"] == results["after"] and measured["before"] == results["before"]
    assert measured["teacher"] == results["teacher"]


def interrupted_and_resumed(recipe, run, after_step, monkeypatch, *options):
    """Stops a run by Ctrl-C after a step, and goes on with it."""
    from abkd.callbacks import StopOnInterrupt

    original = StopOnInterrupt.on_step_end

    def stop(self, args, state, control, **kwargs):
        self.interrupted = state.global_step == after_step
        original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StopOnInterrupt, "on_step_end", stop)
        assert cli.main(["train", str(recipe), f"run_dir={run}", *options]) == cli.INTERRUPTED
    assert cli.main(["train", str(run / "recipe.yaml"), "resume=true"]) == cli.DONE


@pytest.mark.parametrize("step", [2, 3])  # in mid-epoch, and between two
def test_a_resumed_run_equals_an_uninterrupted_one(teacher, data, tmp_path, monkeypatch, step):
    recipe = write_image_recipe(tmp_path, data, teacher)
    assert cli.main(["train", str(recipe)]) == cli.DONE
    interrupted_and_resumed(recipe, tmp_path / "again", step, monkeypatch)
    whole, resumed = (load_file(tmp_path / run / "student/model.safetensors") for run in ("run", "again"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert results_of(tmp_path / "again")["after"] == results_of(tmp_path / "run")["after"]


@pytest.mark.parametrize("where", ["validation", "test"])
def test_the_best_student_is_selected_where_the_recipe_says(teacher, data, tmp_path, where):
    recipe = write_image_recipe(tmp_path, data, teacher)
    options = [f"training.select_on={where}", "training.validate_every_epochs=1", "training.num_epochs=3"]
    options += ["data.num_validation=12"] if where == "validation" else []
    assert cli.main(["train", str(recipe), *options, "training.learning_rate=0.3"]) == cli.DONE
    results, log = results_of(tmp_path / "run"), RunDir(tmp_path / "run").read_metrics()
    accuracies = {line["step"]: line["validation_top1"] for line in log if "validation_top1" in line}
    assert accuracies[results["student_step"]] == max(accuracies.values())
    assert results["selected_on"] == where
    if where == "test":
        assert results["after"]["top1"] == max(accuracies.values())
        assert "best TEST accuracy" in (tmp_path / "run/student/README.md").read_text(encoding="utf-8")
    else:
        assert sum(line["num_images"] for line in log if "loss" in line and line["step"] <= 3) == 48


FEATURES = """objective.features=[
  {kind: crd, student_layer: fc, teacher_layer: fc, num_negatives: 20},
  {kind: itrd, student_layer: layer3, student_side: output, teacher_layer: layer3, weight: 0.5}]"""


def test_terms_on_features_are_trained_resumed_and_no_part_of_the_student(teacher, data, tmp_path, monkeypatch):
    recipe = write_image_recipe(tmp_path, data, teacher)
    assert cli.main(["train", str(recipe), FEATURES]) == cli.DONE
    interrupted_and_resumed(recipe, tmp_path / "again", 2, monkeypatch, FEATURES)
    whole, resumed = (load_file(tmp_path / run / "student/model.safetensors") for run in ("run", "again"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert whole.keys() == load_file(teacher / "model.safetensors").keys()
    for line in RunDir(tmp_path / "run").read_metrics():
        assert line["features"] > 0
        assert line["loss"] == pytest.approx(line["kd"] + line["ce"] + line["features"], rel=1e-4)


@pytest.mark.parametrize(
    "override, message",
    [
        ("objective.features=[{kind: crd, student_layer: fd, teacher_layer: fc}]", "fd"),
        ("data.num_labelled_per_class=1", "negatives=other_classes needs the label of every image"),
    ],
)
def test_a_mistake_in_the_features_is_one_line(teacher, data, tmp_path, capsys, override, message):
    recipe = write_image_recipe(tmp_path, data, teacher)
    assert cli.main(["train", str(recipe), FEATURES, override]) == cli.USERS_MISTAKE
    error = capsys.readouterr().err.rpartition("\r")[2]
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


def test_images_without_labels_count_for_the_divergence_alone(teacher, data, tmp_path, capsys):
    recipe = write_image_recipe(tmp_path, data, teacher)
    assert cli.main(["train", str(recipe), "data.num_labelled_per_class=1"]) == cli.DONE
    assert "60 images of 3 classes to train on, 57 of them without a label" in capsys.readouterr().out
    few = [line for line in RunDir(tmp_path / "run").read_metrics() if "loss" in line]
    assert 0 < sum(line["ce"] for line in few) < 0.2 * len(few)  # 3 of 60 images, at about ln 3 each
    assert all(line["kd"] > 0 for line in few)
    assert not any("mass_into_target" in line for line in few) and all("mass_moved" in line for line in few)


def test_images_out_of_memory_train_as_those_in_memory(teacher, data, tmp_path):
    for split, seed in (("train", 0), ("test", 1)):
        for number, (image, label) in enumerate(zip(*make_images(12, seed), strict=True)):
            folder = tmp_path / "files" / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:02}.png")
    recipe = write_image_recipe(tmp_path, data, teacher)
    options = [f"data.train={tmp_path}/files", "data.test=", f"data.image_size={SIZE}"]
    for in_memory in ("true", "false"):
        run = [f"run_dir={tmp_path}/{in_memory}", f"data.in_memory={in_memory}"]
        assert cli.main(["train", str(recipe), *options, *run]) == cli.DONE
    measured, other = (results_of(tmp_path / in_memory)["after"] for in_memory in ("true", "false"))
    assert measured["confusions"] == other["confusions"]
    for key, value in measured.items():
        if isinstance(value, float):
            assert value == pytest.approx(other[key], rel=1e-4, abs=1e-6)  # Pillow and torch round elsewhere


def test_check_says_what_would_be_trained(teacher, data, tmp_path, capsys):
    recipe = write_image_recipe(tmp_path, data, teacher)
    assert cli.main(["check", str(recipe)]) == cli.DONE
    out = capsys.readouterr().out
    assert "student: resnet8, random weights" in out and "60 images of 3 classes" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override, message",
    [
        ("student.name=resnet9", "student.name=resnet9: there is no such network; did you mean"),
        ("teacher.path=nowhere.pth", "teacher.path: there is no file 'nowhere.pth'"),
        ("teacher=null", "there is no teacher; set teacher.kind and its path"),
        ("data.train=nowhere", "data.train:"),
        ("data.num_validation=60", "data.num_validation=60 takes 20 images of each class"),
        ("training.select_on=validation", "select_on=validation chooses between validations"),
        ("objective.calibration.kind=dkd", "both are; drop one with objective.divergence=null"),
        ("training.milestones=[3, 2]", "milestones"),
        ("data.in_memory=false", "in_memory=false decodes images batch by batch, to one size; set data.image_size"),
        ("data.labels=base", "labels=base is for a clip_set; set data.clip_set, or leave it out"),
        ("student.kind=resnet", "student.kind: 'resnet' is unknown; use one of 'cifar', 'pretrained', 'timm'"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(teacher, data, tmp_path, capsys, override, message):
    recipe = write_image_recipe(tmp_path, data, teacher)
    options = [override, *(["training.schedule=steps"] if "milestones" in override else [])]
    assert cli.main(["train", str(recipe), *options]) == cli.USERS_MISTAKE
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_classes_is_refused(teacher, data, tmp_path, capsys):
    images, labels = make_images(40, 2)
    np.savez(tmp_path / "two.npz", images=images, labels=labels % 2, classes=("bars", "checks"))
    recipe = write_image_recipe(tmp_path, data, teacher)
    np.savez(tmp_path / "two_test.npz", images=images[:20], labels=labels[:20] % 2, classes=("bars", "checks"))
    options = [f"data.train={tmp_path}/two.npz", f"data.test={tmp_path}/two_test.npz"]
    assert cli.main(["train", str(recipe), *options]) == cli.USERS_MISTAKE
    error = capsys.readouterr().err
    assert "teacher.path: " in error and "has 3 classes and 2 are wanted" in error


def test_commands_of_language_models_refuse_image_recipes(data, tmp_path, capsys):
    recipe = write_image_recipe(tmp_path, data)
    assert cli.main(["generate", str(recipe), "--output", str(tmp_path / "x.jsonl")]) == cli.USERS_MISTAKE
    assert "generate: is for language models, and the recipe's task is image_classification" in capsys.readouterr().err
