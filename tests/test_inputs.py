"""What a recipe names is found and checked before anything long starts."""

import json

import pytest

from abkd.errors import InputError
from abkd.inputs import check_inputs
from abkd.recipe import read_recipe


def refusal(file, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        check_inputs(read_recipe(str(file), overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def questions(rows) -> list[str]:
    return [row.prompt[0]["content"] for row in rows]


def test_rows_are_held_out_where_no_validation_file_is_named(recipe_file, data_file):
    inputs = check_inputs(read_recipe(str(recipe_file)))
    every = [json.loads(line)["completion"] for line in data_file.read_text(encoding="utf-8").splitlines()]
    train, validation = ([row.completion for row in rows] for rows in (inputs.train, inputs.validation))
    assert (len(train), len(validation)) == (8, 4)
    assert sorted(train + validation) == sorted(every)
    assert [row for row in every if row in train] == train
    assert check_inputs(read_recipe(str(recipe_file), ["training.seed=5"])) == inputs


def test_a_validation_file_leaves_train_whole(recipe_file, tmp_path):
    file = tmp_path / "validation.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' * 3, encoding="utf-8")
    inputs = check_inputs(read_recipe(str(recipe_file), [f"data.validation={file}"]))
    assert (len(inputs.train), questions(inputs.validation)) == (12, ["a"] * 3)


def test_only_the_first_rows_are_taken_where_a_limit_is_set(recipe_file):
    whole = check_inputs(read_recipe(str(recipe_file)))
    overrides = ["data.max_train_rows=3", "data.max_validation_rows=2"]
    inputs = check_inputs(read_recipe(str(recipe_file), overrides))
    assert inputs.train == whole.train[:3]
    assert inputs.validation == whole.validation[:2]


def test_models_are_listed_with_where_they_come_from(recipe_file, teacher_folder):
    overrides = ["student.kind=pretrained", "student.path=owner/name"]
    assert check_inputs(read_recipe(str(recipe_file), overrides)).models == [
        f"teacher.path: {teacher_folder} ({teacher_folder})",
        "student.path: owner/name (from the model hub)",
    ]
    assert len(check_inputs(read_recipe(str(recipe_file))).models) == 1


@pytest.mark.parametrize("field", ["teacher.path", "student.path", "data.train", "data.validation"])
def test_what_is_not_there_is_named_by_its_field(recipe_file, field):
    kind = ["student.kind=pretrained"] if field == "student.path" else []
    assert refusal(recipe_file, *kind, f"{field}=/no/such/x").startswith(f"{field}: there is no f")


def test_a_malformed_validation_row_is_found(recipe_file, tmp_path):
    file = tmp_path / "validation.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', encoding="utf-8")
    expected = f"{file}:2: field 'completion' is missing; add it as text"
    assert refusal(recipe_file, f"data.validation={file}") == expected


def test_a_hold_out_that_leaves_nothing_is_refused(recipe_file):
    assert refusal(recipe_file, "data.num_held_out=12") == (
        "data.num_held_out=12 leaves nothing to train on: the file has 12 rows; lower it"
    )


def test_a_run_folder_that_exists_is_refused(recipe_file, tmp_path):
    (tmp_path / "run").mkdir()
    assert refusal(recipe_file) == (
        f"run_dir: {str(tmp_path / 'run')!r} exists and is never written over; "
        "give another with run_dir=PATH, or go on with it by resume=true"
    )


def test_resuming_nothing_is_refused(recipe_file, tmp_path):
    expected = f"resume: {str(tmp_path / 'run')!r} holds no run to go on with; start it without resume=true"
    assert refusal(recipe_file, "resume=true") == expected
    (tmp_path / "run").mkdir()
    assert refusal(recipe_file, "resume=true") == expected


@pytest.fixture
def started(recipe_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(read_recipe(str(recipe_file)).to_yaml(), encoding="utf-8")
    return tmp_path / "run" / "recipe.yaml"


def test_resuming_the_same_recipe_passes(recipe_file, started):
    for file in (recipe_file, started):
        assert len(check_inputs(read_recipe(str(file), ["resume=true"])).train) == 8


@pytest.mark.parametrize(
    ("overrides", "then", "now"),
    [
        (["objective.divergence.alpha=0.5"], "alpha: 0.2", "alpha: 0.5"),
        (["training.num_steps=5"], "num_steps: 4", "num_steps: 5"),
        (["objective.divergence.kind=forward_kl"], "kind: alpha_beta", "kind: forward_kl"),
        (["student.kind=pretrained", "student.path=a/b"], "kind: shrink", "kind: pretrained"),
    ],
    ids=["a value", "a length", "a divergence", "a student"],
)
def test_resuming_another_recipe_is_refused_with_the_first_difference(recipe_file, started, overrides, then, now):
    assert refusal(recipe_file, "resume=true", *overrides) == (
        f"resume: {started} was started with {then!r}, not {now!r}; resume with: abkd train {started} resume=true"
    )


SERVED = "teacher={kind: served, url: 'http://127.0.0.1:1', model: big, tail: lump}"
CALIBRATED = ["objective.divergence=null", "objective.calibration={kind: dkd}"]


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["objective.temperature=2"], "at temperature 1, and here is objective.temperature=2; set objective.teacher_t"),
        (["objective.teacher_temperature=3"], "and here is objective.teacher_temperature=3"),
        (CALIBRATED, "objective.calibration.kind=dkd compares whole rows of logits, and teacher.kind=served"),
    ],
)
def test_what_a_servers_rows_cannot_do_is_refused_unasked(recipe_file, teacher_folder, overrides, said):
    own = [SERVED, "student.kind=pretrained", f"student.path={teacher_folder}"]
    assert said in refusal(recipe_file, *own, *overrides)
    assert check_inputs(read_recipe(str(recipe_file), [*own, "objective.teacher_temperature=1"]))
    one = "{kind: served, url: 'http://127.0.0.1:1', model: big, tail: uniform}"
    assert check_inputs(
        read_recipe(str(recipe_file), [*own, *overrides, f"teacher={{kind: mixture, teachers: [{one}, {one}]}}"])
    )


def test_a_cache_that_is_given_as_a_model_is_told_from_one(recipe_file, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    assert refusal(recipe_file, f"teacher.path={tmp_path}") == (
        f"teacher.path: {str(tmp_path)!r} is a cache and not a model; set teacher.kind=cached"
    )
