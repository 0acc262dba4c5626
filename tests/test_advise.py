"""`abkd advise` on a language model and on an image classifier: no training, no folder, a proposal."""

import json

import numpy as np
import pytest
import torch

from abkd import cli
from abkd.models.cifar import CIFAR_MODELS


@pytest.fixture
def image_recipe(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=images, labels=np.arange(24) % 12)
    torch.save(CIFAR_MODELS["resnet8"](12).state_dict(), tmp_path / "teacher.pth")
    teacher = f"teacher={{kind: cifar, name: resnet8, path: {tmp_path}/teacher.pth}}"
    data = [f"data.train={tmp_path}/train.npz", f"data.test={tmp_path}/test.npz"]
    return ["cifar100_alone", *data, "student.name=resnet8", teacher]


DISTIL = ["objective.kd_weight=1", "objective.divergence.kind=forward_kl"]


def test_images(image_recipe, capsys):
    assert cli.main(["advise", *image_recipe, *DISTIL, "--examples", "10"]) == cli.DONE
    out = capsys.readouterr().out
    assert "10 rows of 12 classes" in out and "start with alpha=0.8 beta=0.3" in out and "rule of thumb" in out


def test_texts(recipe_file, tmp_path, capsys):
    assert cli.main(["advise", str(recipe_file), "--examples", "3", "--json"]) == cli.DONE
    found = json.loads(capsys.readouterr().out)
    assert found["overview"]["num_rows"] > 0 and 0 < found["overview"]["overlap"] <= 1
    assert found["advice"]["alpha"] + found["advice"]["beta"] == pytest.approx(1.0, abs=0.11)
    assert not (tmp_path / "run").exists()


def test_rows_of_a_recipe_are_those_of_its_models(image_recipe, recipe_file):
    from abkd.inputs import check_inputs
    from abkd.own_rows import rows_of_recipe
    from abkd.recipe import read_recipe

    for name, options in ((image_recipe[0], [*image_recipe[1:], *DISTIL]), (str(recipe_file), [])):
        recipe = read_recipe(name, options).model_copy(update={"run_dir": "-"})
        rows = rows_of_recipe(recipe, check_inputs(recipe), lambda line: None, num_rows=4)
        assert len(rows) == 4 and len({row.name for row in rows}) == 4
        for row in rows:
            assert row.teacher.exp().sum() == pytest.approx(1) and row.student.exp().sum() == pytest.approx(1)
    assert rows[0].name.startswith("1: …") and rows[0].labels[-1] == "rest"


def test_a_recipe_without_a_teacher_is_refused(capsys, image_recipe):
    assert cli.main(["advise", *image_recipe[:-1]]) == cli.USERS_MISTAKE
    assert "teacher: there is none to compare with" in capsys.readouterr().err
