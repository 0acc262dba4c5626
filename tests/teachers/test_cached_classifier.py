"""Logits of an image classifier out of a cache are those of the classifier, of every crop of every epoch."""

import json

import numpy as np
import pytest
import torch

from abkd import cli
from abkd.caching import pictures
from abkd.teachers.cached_classifier import plain_image, plain_keys


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    chosen = np.random.RandomState(0)
    labels = {"train": np.arange(24) % 3, "test": np.arange(9) % 3}
    arrays = {}
    for split, classes in labels.items():
        noise = chosen.randint(0, 60, (len(classes), 8, 8, 3))
        arrays |= {f"{split}_images": (noise + 60 * classes[:, None, None, None]).astype(np.uint8)}
        arrays |= {f"{split}_labels": classes}
    np.savez(folder / "images.npz", **arrays)
    file = folder / "recipe.yaml"
    file.write_text(
        f"""task: image_classification
student: {{kind: cifar, name: resnet8, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}
data: {{train: "{folder / "images.npz"}", num_validation: 6, augmentation: {{crop_padding: 1}}}}
objective: {{kd_weight: 0, ce_weight: 1}}
training: {{num_epochs: 3, batch_size: 6, learning_rate: 0.01, schedule: cosine}}
run_dir: "{folder / "teacher"}"
""",
        encoding="utf-8",
    )
    assert cli.main(["train", str(file), "training.num_epochs=1"]) == cli.DONE
    return file


def objective(kind):
    if kind == "dkd":
        return ["objective.calibration={kind: dkd}", "objective.kd_weight=1"]
    return [f"objective.divergence={{kind: {kind}}}", "objective.kd_weight=1"]


def teacher_of(recipe_file):
    return ["teacher.kind=cifar", f"teacher.path={recipe_file.parent / 'teacher/student'}"]


@pytest.fixture(scope="module")
def cache(recipe_file):
    folder = recipe_file.parent / "cache"
    arguments = [str(recipe_file), "--targets", "logits", "--output", str(folder), "--shard-tokens", "20"]
    assert cli.main(["cache", *arguments, *teacher_of(recipe_file), *objective("alpha_beta")]) == cli.DONE
    return folder


def cached(cache):
    return ["teacher.kind=cached", f"teacher.path={cache}"]


def train(recipe_file, run_dir, *overrides):
    assert cli.main(["train", str(recipe_file), f"run_dir={run_dir}", *overrides]) == cli.DONE
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], json.loads((run_dir / "results.json").read_text())


@pytest.mark.parametrize("kind", ["alpha_beta", "dkd"])
def test_a_run_is_that_of_the_teacher_in_this_process(recipe_file, cache, tmp_path, kind):
    wanted = [*objective(kind), "training.log_every=1", "training.validate_every_epochs=1"]
    wanted += ["training.select_on=validation"]
    near, measured = train(recipe_file, tmp_path / "near", *teacher_of(recipe_file), *wanted)
    far, measured_far = train(recipe_file, tmp_path / "far", *cached(cache), *wanted)
    assert len(near) == 9 and far == pytest.approx(near, rel=1e-5)
    assert measured_far["after"]["forward_kl"] == pytest.approx(measured["after"]["forward_kl"], rel=1e-4)
    assert "teacher" not in measured_far
    card = (tmp_path / "far/student/README.md").read_text()
    assert f"distilled from targets that `{recipe_file.parent / 'teacher/student'}` wrote" in card


def test_the_cache_is_whole_and_says_what_it_is(cache, capsys):
    assert cli.main(["cache", "info", str(cache)]) == cli.DONE
    said = capsys.readouterr().out
    assert "logits, 3 x float32" in said and "of: 69 examples, 69 images, 3 classes" in said  # 3 x 18 + 6 + 9
    assert cli.main(["cache", "verify", str(cache)]) == cli.DONE


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["training.num_epochs=4"], "has the crops of 3 epochs, and the training has 4"),
        (["data.augmentation.flip=false"], "was made with augmentation.flip=True, and here is augmentation.flip=False"),
        (["data.num_validation=3"], "was made with train.num_images=18, and here is train.num_images=21"),
    ],
)
def test_other_images_are_refused_with_both_sides(recipe_file, cache, tmp_path, capsys, overrides, message):
    wanted = [f"run_dir={tmp_path / 'run'}", *cached(cache), *objective("alpha_beta"), *overrides]
    assert cli.main(["train", str(recipe_file), *wanted]) == cli.USERS_MISTAKE
    assert message in capsys.readouterr().err.strip().splitlines()[-1] and not (tmp_path / "run").exists()


def test_crops_that_come_again_need_a_cache_of_no_more(recipe_file, cache, tmp_path):
    again = [
        "data.augmentation.repeat_every=3",
        "training.num_epochs=5",
        "training.log_every=1",
        *objective("forward_kl"),
    ]
    near, _ = train(recipe_file, tmp_path / "near", *teacher_of(recipe_file), *again)
    far, _ = train(recipe_file, tmp_path / "far", *cached(cache), *again)
    assert len(near) == 15 and far == pytest.approx(near, rel=1e-5)


def test_terms_on_features_need_the_teacher_itself(recipe_file, cache, capsys):
    feature = "objective.features=[{kind: itrd, student_layer: fc, teacher_layer: fc}]"
    assert cli.main(["train", str(recipe_file), *cached(cache), *objective("alpha_beta"), feature]) == cli.USERS_MISTAKE
    assert "teacher.kind=cached has none" in capsys.readouterr().err


def test_other_targets_than_logits_are_refused(recipe_file, tmp_path, capsys):
    arguments = ["cache", str(recipe_file), "--output", str(tmp_path / "c"), *teacher_of(recipe_file)]
    assert cli.main([*arguments, *objective("alpha_beta")]) == cli.USERS_MISTAKE
    assert "--targets=top_k: is of language models" in capsys.readouterr().err and not (tmp_path / "c").exists()


@pytest.mark.parametrize("part", ["test", "validation"])
def test_keys_of_plain_images_are_their_own(part):
    keys = plain_keys(part, torch.arange(7))
    assert (keys < 0).all() and plain_image(keys)[0] == part
    assert torch.equal(plain_image(keys)[1], torch.arange(7))
    assert not set(plain_keys("test", torch.arange(9)).tolist()) & set(
        plain_keys("validation", torch.arange(9)).tolist()
    )


@pytest.mark.parametrize("command", ["advise", "explore"])
def test_what_looks_at_the_teacher_needs_it_itself(recipe_file, cache, capsys, command):
    assert cli.main([command, str(recipe_file), *cached(cache), *objective("alpha_beta")]) == cli.USERS_MISTAKE
    assert "teacher.kind=cached: this needs the teacher's network" in capsys.readouterr().err


@pytest.mark.parametrize("given, largest", [([], 18), (["--batch-size", "5"], 5)])
def test_a_batch_is_as_large_as_asked_for(recipe_file, tmp_path, monkeypatch, given, largest):
    sizes, images = [], pictures._Writer._images
    monkeypatch.setattr(pictures._Writer, "_images", lambda self, keys: sizes.append(len(keys)) or images(self, keys))
    arguments = [str(recipe_file), "--targets", "logits", "--output", str(tmp_path / "c"), "training.num_epochs=1"]
    assert cli.main(["cache", *arguments, *given, *teacher_of(recipe_file), *objective("alpha_beta")]) == cli.DONE
    assert max(sizes) == largest and sum(sizes) == 18 + 6 + 9
