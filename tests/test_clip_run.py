"""Prompted CLIP through the whole command line: a teacher of base classes, its student, each set's recipe, mistakes."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from models.tiny_clip import TOKENIZER, make_clip
from PIL import Image
from safetensors.torch import load_file
from test_image_run import interrupted_and_resumed, results_of

from abkd import cli
from abkd.data.clip_sets import CLIP_SETS
from abkd.models.clip import CLIPTeacher, accuracy_among, load_clip, load_clip_student, text_features
from abkd.models.clip_files import load_prompts
from abkd.models.clip_prompts import initial_vision, tokenize
from abkd.recipe import RECIPES, read_recipe, recipe_names
from abkd.rundir import RunDir

NAMES = ["cat", "dog", "tabby_cat", "fox", "a hen"]
"""The first three are base."""
SIZE, COLOURS = 40, [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200)]
SETS = sorted(name for name in recipe_names() if name.startswith("clip/"))


def write_images(folder, part, count, seed):
    """Five colours under noise, PNG files of `SIZE` x 36; rows of a split."""
    rng, rows = np.random.default_rng(seed), []
    for label, (name, colour) in enumerate(zip(NAMES, COLOURS, strict=True)):
        for number in range(count):
            pixels = np.clip(np.array(colour) + rng.normal(0, 30, (SIZE, 36, 3)), 0, 255).astype(np.uint8)
            path = f"{part}/{label}_{number}.png"
            (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / path)
            rows.append([path, label, name])
    return rows


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The folder of all sets, which share their files: 6 images of a class to train on, 3 to test with."""
    root = tmp_path_factory.mktemp("sets")
    shared = root / "shared"
    split = {part: write_images(shared, part, count, seed) for seed, (part, count) in enumerate(PARTS.items())}
    for each in CLIP_SETS.values():
        folder = root / each.folder / each.images
        if not each.split_file:
            write_imagenet(root / each.folder, shared, split)
            continue
        folder.mkdir(parents=True)
        for part in PARTS:
            (folder / part).symlink_to(shared / part)
        (root / each.folder / each.split_file).write_text(json.dumps(split), encoding="utf-8")
    return root


PARTS = {"train": 6, "val": 1, "test": 3}


def write_imagenet(folder, shared, split):
    for part, source in (("train", "train"), ("val", "test")):
        for path, label, _ in split[source]:
            (folder / "images" / part / f"n{label}").mkdir(parents=True, exist_ok=True)
            (folder / "images" / part / f"n{label}" / path.rpartition("/")[2]).symlink_to(shared / path)
    text = "".join(f"n{label} {name}\n" for label, name in enumerate(NAMES))
    (folder / "classnames.txt").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Folders of a wide CLIP and of a narrow one."""
    folder = tmp_path_factory.mktemp("clips")
    for name, options in (("large", {"width": 24, "shared": 20, "seed": 1}), ("small", {})):
        make_clip(**options).save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    return folder


def small(recipe, sets, clips, run, *options):
    """The recipe on the small sets, with the wide CLIP as teacher, or the one that becomes a teacher."""
    paths = [f"teacher.path={clips}/large", f"student.path={clips}/small"]
    paths = paths if "base_to_new" in recipe else [f"student.path={clips}/large"]
    return [recipe, *paths, f"data.train={sets}", "data.image_size=32", "student.depth=3", f"run_dir={run}",
            "training.log_every=1", "training.save_every_epochs=0", *options]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(sets, clips, tmp_path_factory):
    """The run that trained it, on 2 images of each of 3 base classes."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    options = ["training.num_epochs=8", "data.num_per_class=2", "training.batch_size=3", "training.warmup_epochs=0"]
    assert cli.main(["train", *small("clip_teacher", sets, clips, run, *options)]) == cli.DONE
    return run


def distil(sets, clips, teacher, run, *options):
    options = [f"teacher.prompts={teacher}/student", "training.num_epochs=2", *options]
    return ["train", *small("clip_base_to_new", sets, clips, run, *options)]


@pytest.fixture(scope="module")
def student(sets, clips, teacher, tmp_path_factory):
    run = tmp_path_factory.mktemp("student") / "run"
    assert cli.main(distil(sets, clips, teacher, run, "training.save_every_epochs=1")) == cli.DONE
    return run


def test_a_teacher_is_trained_on_few_images_of_base_classes(teacher):
    results = results_of(teacher)
    assert results["after"]["base_accuracy"] > results["before"]["base_accuracy"]
    assert results["after"]["num_images"] == 15 and results["num_steps"] == 16
    steps = [line for line in RunDir(teacher).read_metrics() if "loss" in line]
    assert [line["num_images"] for line in steps] == [3] * 16
    assert steps[-1]["loss"] < steps[0]["loss"]
    prompts = load_file(teacher / "student" / "clip_prompts.safetensors")
    assert {name: list(each.shape) for name, each in prompts.items()} == {"vision": [3, 4, 48], "text": [3, 4, 24]}


def test_a_student_is_distilled_without_labels(student, capsys):
    results = results_of(student)
    assert results["after"]["alpha_beta"] < results["before"]["alpha_beta"]
    assert results["teacher"]["agreement"] == 1
    steps = [line for line in RunDir(student).read_metrics() if "loss" in line]
    assert [line["num_images"] for line in steps] == [8] * 6  # of 30 images an epoch, 6 of them left out
    assert all(line["ce"] == 0 and line["loss"] == pytest.approx(200 * line["kd"], rel=1e-4) for line in steps)
    card = (student / "student" / "README.md").read_text(encoding="utf-8")
    assert "images of `Caltech101`" in card and "| base | new | harmonic mean |" in card


def test_base_and_new_are_each_measured_among_their_own(sets, clips, teacher, student):
    """The saved prompts and student, read back and measured by hand."""
    results, rows = results_of(student), json.loads((sets / "caltech-101/split_zhou_Caltech101.json").read_text())
    images = torch.stack([pixels(sets / "shared" / path) for path, *_ in rows["test"]])
    labels = torch.tensor([label for _, label, _ in rows["test"]])
    clip = load_clip(str(clips / "large"), "teacher.path")
    prompts = load_prompts(str(teacher / "student"), clip)
    ids = tokenize(clip, TOKENIZER, [f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    models = {
        "teacher": CLIPTeacher(clip, text_features(clip, prompts.text, ids), prompts.vision),
        "after": load_clip_student(student / "student", load_clip(str(clips / "small"), "student.path")),
    }
    for name, model in models.items():
        with torch.no_grad():
            logits = model(images)
        base, new = (accuracy_among(logits, labels, part) for part in (range(3), range(3, 5)))
        assert results[name]["base_accuracy"] == pytest.approx(base)
        assert results[name]["new_accuracy"] == pytest.approx(new)
        assert results[name]["harmonic_mean"] == pytest.approx(2 * base * new / (base + new) if base + new else 0)
        assert results[name]["top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def pixels(file):
    image = Image.open(file).crop((0, 2, 36, 38)).resize((32, 32), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def test_checkpoints_hold_what_is_trained_alone(student):
    (state,) = [load_file(folder / "model.safetensors") for folder in RunDir(student).whole_checkpoints()[-1:]]
    saved = load_file(student / "student" / "clip_student.safetensors")
    assert state.keys() == saved.keys() and all(torch.equal(state[key], saved[key]) for key in saved)
    assert not any("tower" in key for key in state)


def test_eval_measures_the_saved_ones_as_training_did(teacher, student, capsys):
    for run in (teacher, student):
        capsys.readouterr()
        assert cli.main(["eval", str(run), "--json"]) == cli.DONE
        measured, results = json.loads(capsys.readouterr().out), results_of(run)
        assert measured["student"] == results["after"] and measured["before"] == results["before"]
        assert measured.get("teacher") == results.get("teacher")
    assert cli.main(["eval", str(student)]) == cli.DONE
    assert re.search(r"base\W+new\W+harmonic mean", capsys.readouterr().out)


def test_a_resumed_run_equals_an_uninterrupted_one(sets, clips, teacher, student, tmp_path, monkeypatch):
    command, *rest = distil(sets, clips, teacher, tmp_path / "unused")[1:]
    interrupted_and_resumed(command, tmp_path / "again", 2, monkeypatch, *[o for o in rest if "run_dir" not in o])
    whole, resumed = (load_file(run / "student/clip_student.safetensors") for run in (student, tmp_path / "again"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert results_of(tmp_path / "again")["after"] == results_of(student)["after"]


def test_zero_shot_clip_teaches_with_the_template_of_the_set(sets, clips, tmp_path, capsys):
    options = ["teacher.prompts=", "data.clip_set=EuroSAT", "training.num_epochs=1", "objective.divergence=null",
               "objective.calibration.kind=ttm"]  # fmt: skip
    recipe = small("clip_base_to_new", sets, clips, tmp_path / "run", *options)
    assert cli.main(["train", *recipe]) == cli.DONE
    clip = load_clip(str(clips / "large"), "teacher.path")
    ids = tokenize(clip, TOKENIZER, [f"a centered satellite photo of {name.replace('_', ' ')}." for name in NAMES])
    features = text_features(clip, torch.zeros(1, 0, 24), ids)
    saved = load_file(tmp_path / "run/student/clip_student.safetensors")["text_features"]
    assert torch.equal(saved, features) and initial_vision(clip, 0, 1).numel() == 0
    assert "zero-shot" not in capsys.readouterr().err


def test_the_pieces_have_the_papers_points_and_their_own_folders():
    assert len(SETS) == 11
    for piece, each in zip(SETS, sorted(CLIP_SETS.values(), key=lambda each: each.name.lower()), strict=True):
        recipe = read_recipe(f"clip_base_to_new+{piece}")
        assert recipe.data.clip_set == each.name
        assert (recipe.objective.divergence.alpha, recipe.objective.divergence.beta) == (each.alpha, each.beta)
        teacher = read_recipe(f"clip_teacher+{piece}")
        assert recipe.teacher.prompts == f"{teacher.run_dir}/student" and piece.endswith(recipe.run_dir[-4:])
        assert teacher.data == recipe.data.model_copy(update={"labels": "base", "num_per_class": 16})
        assert len(yaml.safe_load((RECIPES / f"{piece}.yaml").read_text(encoding="utf-8"))) == 2


@pytest.mark.parametrize("name", [*(f"clip_base_to_new+{piece}" for piece in SETS), "clip_teacher+clip/imagenet"])
def test_a_set_takes_two_steps(name, sets, clips, teacher, tmp_path, capsys):
    options = [f"teacher.prompts={teacher}/student"] if "teacher" not in name else []
    options += ["training.num_steps=2", "training.num_epochs=0", "training.batch_size=4"]
    assert cli.main(["train", *small(name, sets, clips, tmp_path / "run", *options)]) == cli.DONE, (
        capsys.readouterr().err
    )
    assert results_of(tmp_path / "run")["num_steps"] == 2


@pytest.mark.parametrize(
    "option, message",
    [
        ("data.clip_set=caltech", "data.clip_set='caltech': there is no such set; did you mean Caltech101?"),
        ("data.train=nowhere", "data.train: Caltech101 needs nowhere/caltech-101"),
        ("data.image_size=0", "set data.image_size, as 224"),
        ("data.num_per_class=4", "num_per_class=4 is not for clip_set=Caltech101 with labels=none; leave it out"),
        ("data.test_split=val", "test_split='val' is not for clip_set=Caltech101"),
        ("objective.ce_weight=1", "objective.ce_weight=1 needs labels, and data.labels=none trains without"),
        ("objective.calibration.kind=dkd", "objective.calibration.kind=dkd needs the label of every image"),
        ("teacher={kind: cifar, path: x.pth}", "student.kind=clip takes the text features of its teacher"),
        ("objective.features=[{kind: itrd, student_layer: a, teacher_layer: b}]", "not of kind=clip"),
        ("teacher.prompts=nowhere", "teacher.prompts: there is no 'nowhere'"),
        ("training.batch_size=1", "training.batch_size=1: 30 images leave a batch of 1"),
        ("training.batch_size=31", "training.batch_size=31: the 30 training images make no full batch"),
    ],
)
def test_a_mistake_is_one_line_before_torch(sets, clips, teacher, tmp_path, capsys, option, message):
    extra = [option, *(["objective.divergence=null"] if "dkd" in option else [])]
    check_refused(distil(sets, clips, teacher, tmp_path / "run", *extra), message, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option, message",
    [
        ("teacher.path=SMALL", "was made for another CLIP"),
        ("student.prompts=TEACHER", "holds no clip_student.safetensors"),
        ("student.depth=4", "student.depth=4: "),
        ("teacher.path=IMAGES", "teacher.path"),
    ],
)
def test_what_does_not_fit_is_one_line(sets, clips, teacher, tmp_path, capsys, option, message):
    for name, path in (("SMALL", clips / "small"), ("TEACHER", teacher / "student"), ("IMAGES", sets)):
        option = option.replace(name, str(path))
    check_refused(distil(sets, clips, teacher, tmp_path / "run", option), message, capsys)


def test_a_student_of_other_classes_is_refused(sets, clips, teacher, student, tmp_path, capsys):
    other = tmp_path / "sets" / "dtd"
    (other / "images").mkdir(parents=True)
    for part in PARTS:
        (other / "images" / part).symlink_to(sets / "shared" / part)
    renamed = (sets / "dtd/split_zhou_DescribableTextures.json").read_text().replace("fox", "wolf")
    (other / "split_zhou_DescribableTextures.json").write_text(renamed, encoding="utf-8")
    options = [f"student.prompts={student}/student", f"data.train={tmp_path}/sets", "data.clip_set=DTD"]
    check_refused(distil(sets, clips, teacher, tmp_path / "run", *options), "give a student of this set", capsys)


def test_a_torn_image_is_named(sets, clips, teacher, tmp_path, capsys):
    folder = tmp_path / "sets" / "dtd"
    (folder / "images").mkdir(parents=True)
    for part in ("val", "test", "train"):
        target = folder / "images" / part
        target.mkdir()
        for file in (sets / "shared" / part).iterdir():
            (target / file.name).symlink_to(file)
    split = (sets / "dtd/split_zhou_DescribableTextures.json").read_text()
    (folder / "split_zhou_DescribableTextures.json").write_text(split, encoding="utf-8")
    (folder / "images/test/4_2.png").unlink()
    (folder / "images/test/4_2.png").write_bytes(b"no image")
    options = [f"data.train={tmp_path}/sets", "data.clip_set=DTD"]
    check_refused(distil(sets, clips, teacher, tmp_path / "run", *options), "test/4_2.png cannot be read", capsys)


def check_refused(command, message, capsys):
    assert cli.main(command) == cli.USERS_MISTAKE
    error = capsys.readouterr().err.rpartition("\r")[2]
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
