"""Every shipped recipe and composition loads; every recipe takes two steps with tiny models of its architecture."""

import itertools
import json

import numpy as np
import pytest
import torch
import yaml
from conftest import make_gpt2, make_llama
from transformers import Qwen2Config, Qwen2ForCausalLM

from abkd import cli
from abkd.errors import InputError
from abkd.models.cifar import CIFAR_MODELS
from abkd.recipe import RECIPES, read_recipe, recipe_names

WHOLE = [name for name in recipe_names() if "/" not in name and name != "demo"]
TASK = {name: read_recipe(name).task for name in WHOLE}
IMAGES = [name for name in WHOLE if TASK[name] == "image_classification" and not name.startswith("clip_")]
"""Those of CLIP run in test_clip_run.py."""
NAMES = [name for name in WHOLE if TASK[name] == "language_model"]
PIECES = {
    folder: [name for name in recipe_names() if name.startswith(f"{folder}/")] for folder in ("losses", "strategies")
}
STUDENTS = ("gpt2_base", "gpt2_medium", "gpt2_large", "openllama2_3b")


def test_every_composition_of_the_tables_loads():
    composed = [f"{s}+{loss}" for s, loss in itertools.product(STUDENTS, PIECES["losses"])]
    composed += [f"{s}+{loss}+{how}" for s, loss, how in itertools.product(STUDENTS, *PIECES.values())]
    composed += [f"gpt2_base+teachers/{teacher}" for teacher in ("gpt2_medium", "gpt2_large")]
    for name in composed:
        recipe = read_recipe(name)
        for part in name.split("+")[1:]:
            content = yaml.safe_load((RECIPES / f"{part}.yaml").read_text(encoding="utf-8"))
            for section, keys in content.items():
                for key, value in keys.items():
                    found = recipe.to_dict()[section][key]
                    assert found == value if not isinstance(value, dict) else found.items() >= value.items(), name


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_short_and_its_header_names_a_table(name):
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 130
    if name != "demo" and not name.startswith("settings/"):
        assert lines[0].startswith("# Table") and " | " in lines[0]
    if name in WHOLE:
        assert any("Hardware:" in line for line in lines if line.startswith("#"))


def make_qwen2(vocab_size):
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer):
    """Overrides that make any of the recipes small."""
    folder = tmp_path_factory.mktemp("small")
    make = {"gpt2": make_gpt2, "openllama2": make_llama, "qwen2.5": make_qwen2}
    for name, make_model in make.items():
        model = make_model(len(tokenizer) + 6)  # a tokenizer of another class may add some
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": f"Pet {n}?", "completion": f"The cat likes {n}."} for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "corpus.jsonl").write_text(json.dumps({"text": "The cat likes milk. " * 60}), encoding="utf-8")
    return folder


def overrides(recipe, folder, small, family):
    model, rows = small / family, small / "rows.jsonl"
    found = [f"data.train={rows}", "data.validation=", "data.num_held_out=2", f"run_dir={folder / 'run'}"]
    found += [f"teacher.path={model}"] if recipe.teacher else []
    found += [f"student.path={model}"]
    found += [f"data.corpus={small / 'corpus.jsonl'}", "data.corpus_tokens=16"] if recipe.data.corpus else []
    found += [f"evaluation.sets.{name}.path={rows}" for name in recipe.evaluation.sets]
    found += ["evaluation.num_seeds=2"] if recipe.evaluation.temperature else []
    found += ["rollouts.max_new_tokens=4"] if recipe.rollouts.kind != "fixed" else []
    return [*found, "training.num_steps=2", "training.num_epochs=0", "training.batch_size=2", "training.accumulation=2",
            "training.validate_every=1", "training.save_every=0", "training.precision=fp32", "training.log_every=1",
            "data.max_prompt_tokens=220", "data.max_tokens=245", "evaluation.max_new_tokens=3"]  # fmt: skip


RUN = [*NAMES, *(f"gpt2_base+{piece}" for piece in itertools.chain(*PIECES.values())), "gpt2_base+teachers/gpt2_large"]


@pytest.mark.parametrize("name", RUN)
def test_a_recipe_takes_two_steps(name, small, tmp_path, capsys):
    family = name.split("_")[0]
    options = overrides(read_recipe(name), tmp_path, small, family)
    options += ["evaluation.sets={}"] if "+" in name else []
    assert cli.main(["train", name, *options]) == cli.DONE, capsys.readouterr().err
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["num_steps"] == 2


METHODS = [name for name in recipe_names() if name.startswith("methods/")]
PAIRS = [name for name in IMAGES if read_recipe(name).teacher]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_method_over_a_pair_has_the_values_of_table_4(pair):
    """What stands under `tuned` reaches the recipe, and the pair alone is the pair under ABKD."""
    for method in METHODS:
        objective = read_recipe(f"{pair}+{method}").objective
        inside = objective.divergence or objective.calibration.divergence
        name = method.removeprefix("methods/")
        kinds = {"kd": "forward_kl", "rkl": "reverse_kl"}
        assert inside.kind == (kinds.get(name) or ("alpha_beta" if name.startswith("ab") else "forward_kl"))
        if name.startswith("ab"):
            assert inside.model_dump(exclude={"kind"}) == TABLE_4[pair][name]
        kinds = {"dkd": "dkd", "lsd": "lsd", "ttm": "ttm"}
        assert (objective.calibration and objective.calibration.kind) == kinds.get(name.removeprefix("ab"))
    assert read_recipe(pair).objective == read_recipe(f"{pair}+methods/abkd").objective


def table_4(*rows):
    names = ("abkd", "abdkd", "ablsd", "abttm")
    return {
        pair: {name: {"alpha": alpha, "beta": beta} for name, (alpha, beta) in zip(names, points, strict=True)}
        for pair, points in rows
    }


TABLE_4 = table_4(
    ("wrn_40_2_wrn_16_2", [(0.6, 0.5), (0.8, 0.4), (0.9, 0.1), (0.8, 0.3)]),
    ("wrn_40_2_wrn_40_1", [(0.9, 0.2), (1.0, 0.2), (0.8, 0.4), (1.0, 0.1)]),
    ("resnet56_resnet20", [(0.8, 0.3), (1.0, 0.2), (0.9, 0.3), (0.7, 0.5)]),
    ("resnet110_resnet20", [(0.8, 0.3), (0.8, 0.3), (1.2, -0.1), (0.9, 0.2)]),
    ("resnet110_resnet32", [(0.7, 0.4), (0.9, 0.3), (0.9, 0.2), (0.8, 0.3)]),
    ("resnet32x4_resnet8x4", [(0.5, 0.5), (0.8, 0.3), (1.2, -0.2), (0.8, 0.3)]),
    ("vgg13_vgg8", [(0.9, 0.2), (0.7, 0.4), (1.0, 0.2), (0.7, 0.5)]),
    ("resnet110_resnet44", [(0.8, 0.3), (0.8, 0.3), (1.0, 0.2), (0.8, 0.2)]),
    ("resnet50_vgg8", [(0.8, 0.3)] * 4),  # the paper gives none
)


@pytest.fixture(scope="module")
def small_images(tmp_path_factory):
    """Eight black and white images, and new weights of every teacher for their two classes."""
    folder = tmp_path_factory.mktemp("small_images")
    images = np.repeat(np.array([0, 255], dtype=np.uint8), 16 * 16 * 3).reshape(2, 16, 16, 3)
    for split in ("train", "test"):
        np.savez(folder / f"{split}.npz", images=np.tile(images, (4, 1, 1, 1)), labels=np.arange(8) % 2)
    for name in {read_recipe(pair).teacher.name for pair in PAIRS}:
        torch.save(CIFAR_MODELS[name](2).state_dict(), folder / f"{name}.pth")
    return folder


@pytest.mark.parametrize("name", [*IMAGES, *(f"resnet56_resnet20+{method}" for method in METHODS)])
def test_a_recipe_for_images_takes_two_steps(name, small_images, tmp_path, capsys):
    recipe = read_recipe(name)
    options = [f"data.train={small_images}/train.npz", f"data.test={small_images}/test.npz"]
    options += [f"teacher.path={small_images}/{recipe.teacher.name}.pth"] if recipe.teacher else []
    options += ["training.num_steps=2", "training.num_epochs=0", "training.batch_size=4", f"run_dir={tmp_path / 'run'}"]
    assert cli.main(["train", name, *options]) == cli.DONE, capsys.readouterr().err
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["num_steps"] == 2


def write(folder, name, text):
    file = folder / f"{name}.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_file_extends_others_in_order_and_by_its_own_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path, "loss", "objective: {divergence: {kind: jsd, mix: 0.3}, kd_weight: 2}")
    write(tmp_path / "deep", "rate", "extends: ../loss.yaml\ntraining: {learning_rate: 7.0e-5}")
    mine = write(tmp_path, "mine", "extends: [demo, deep/rate.yaml]\nrun_dir: runs/mine\ntraining: {seed: 5}")
    recipe = read_recipe(str(mine))
    demo = read_recipe("demo")
    assert recipe.objective.divergence.kind == "jsd" and recipe.objective.divergence.mix == 0.3
    assert recipe.objective.kd_weight == 2 and recipe.run_dir == "runs/mine" and recipe.student == demo.student
    assert (recipe.training.learning_rate, recipe.training.seed) == (7e-5, 5)
    assert recipe.training.num_steps == demo.training.num_steps and "extends" not in recipe.to_yaml()
    assert read_recipe(f"demo+{tmp_path / 'loss.yaml'}", ["objective.kd_weight=3"]).objective.kd_weight == 3


def test_another_kind_starts_its_section_afresh(tmp_path):
    mine = write(tmp_path, "mine", "extends: demo\nobjective: {divergence: {kind: alpha_beta, alpha: 0.9}}")
    assert read_recipe(str(mine)).objective.divergence.beta == 0.7
    other = write(tmp_path, "other", "extends: mine.yaml\nobjective: {divergence: {kind: jsd}}")
    assert read_recipe(str(other)).objective.divergence.mix == 0.5


@pytest.mark.parametrize(
    "text, message",
    [
        ("extends: mine.yaml", "extends itself, by way of"),
        ("extends: none", "there is no shipped recipe or file 'none'"),
        ("extends: {a: b}", "extends: {'a': 'b'} in"),
        ("extends: gpt2_bse", "did you mean 'gpt2_base'?"),
        (
            "extends: demo\ntraining: {learning_rat: 1}",
            r"learning_rat: unknown key; did you mean 'learning_rate'",
        ),
    ],
)
def test_a_mistake_in_extending_is_one_line(tmp_path, text, message):
    mine = write(tmp_path, "mine", text)
    with pytest.raises(InputError, match=message):
        read_recipe(str(mine))


def test_the_list_groups_the_pieces(capsys):
    assert cli.main(["recipes"]) == cli.DONE
    out = capsys.readouterr().out
    assert "\ngpt2_base  " in out and "\nlosses/ (a piece" in out and "Table 8 | mixed" in out
    assert cli.main(["recipes", "losses/jsd"]) == cli.DONE
    assert "kind: jsd" in capsys.readouterr().out


def test_what_is_tuned_for_a_piece_lies_over_it(tmp_path):
    write(tmp_path, "piece", "objective: {divergence: {kind: jsd, mix: 0.3}, kd_weight: 2}")
    mine = write(tmp_path, "mine", "extends: demo\ntuned: {piece.yaml: {objective: {divergence: {mix: 0.4}}}}")
    assert read_recipe(str(mine)).objective.divergence.kind == "alpha_beta"
    both = write(tmp_path, "both", "extends: [mine.yaml, piece.yaml]")
    objective = read_recipe(str(both)).objective
    assert (objective.divergence.mix, objective.kd_weight) == (0.4, 2)
    wrong = write(tmp_path, "wrong", "extends: demo\ntuned: {peice.yaml: {objective: {kd_weight: 1}}}")
    with pytest.raises(InputError, match=r"there is no shipped recipe or file .peice\.yaml."):
        read_recipe(str(wrong))
    wrong = write(tmp_path, "wrong", "extends: demo\ntuned: [a]")
    with pytest.raises(InputError, match=r"tuned: .* is refused: give sections"):
        read_recipe(str(wrong))
