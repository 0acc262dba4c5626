"""Recipes: every mistake is one line with the field, the value and the way out; a resolved recipe reads back equal."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from abkd.errors import InputError
from abkd.paths import find_path
from abkd.recipe import RECIPES, parse_recipe, read_recipe, recipe_names

SECTIONS = "data, evaluation, objective, resume, rollouts, run_dir, student, task, teacher, training"
MINIMAL = {
    "task": "language_model",
    "teacher": {"path": "/teacher"},
    "student": {"kind": "shrink", "keep_layers": 2},
    "data": {"train": "/train.jsonl"},
    "objective": {"divergence": {"kind": "alpha_beta"}},
    "training": {"num_steps": 4, "learning_rate": 1e-3},
    "run_dir": "runs/x",
}


@pytest.fixture
def minimal_file(tmp_path):
    file = tmp_path / "minimal.yaml"
    file.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    return file


def refusal(file, *overrides: str) -> list[str]:
    """The lines with which a recipe is refused."""
    with pytest.raises(InputError) as caught:
        read_recipe(str(file), overrides)
    return str(caught.value).splitlines()


WRONG_VALUES = {
    "objective.divergence.alpha=.nan": "nan is refused: input should be a finite number",
    "objective.divergence.alpha=nan": "'nan' is refused: input should be a finite number",
    "objective.divergence.beta=.inf": "inf is refused: input should be a finite number",
    "objective.divergence.beta=-.inf": "-inf is refused: input should be a finite number",
    "objective.divergence.alpha=lots": (
        "'lots' is refused: input should be a valid number, unable to parse string as a number"
    ),
    "training.learning_rate=0": "0 is refused: input should be greater than 0",
    "training.learning_rate=.inf": "inf is refused: input should be a finite number",
    "training.num_epochs=.nan": "nan is refused: input should be a finite number",
    "training.num_steps=2.5": ("2.5 is refused: input should be a valid integer, got a number with a fractional part"),
    "training.batch_size=[1, 2]": "[1, 2] is refused: input should be a valid integer",
    "training.seed=-1": "-1 is refused: input should be greater than or equal to 0",
    "student.keep_layers=-1": "-1 is refused: input should be greater than or equal to 0",
    "objective.temperature=0": "0 is refused: input should be greater than 0",
    "objective.kd_weight=-1": "-1 is refused: input should be greater than or equal to 0",
    "data.prompt_format=markdown": "'markdown' is refused: input should be 'chat', 'alpaca' or 'plain'",
    "data.train=5": "5 is refused: input should be a valid string",
    "teacher.remember=maybe": "'maybe' is refused: input should be a valid boolean, unable to interpret input",
    "run_dir=": "'' is refused: string should have at least 1 character",
    "task=vision": "'vision' is unknown; use one of 'language_model', 'image_classification'",
    "evaluation=3": "3 is refused: it is a section and holds keys, as in evaluation.KEY=VALUE",
    "student=small": "'small' is refused: it is a section and holds keys, as in student.KEY=VALUE",
    "objective.divergence=forward_kl": (
        "'forward_kl' is refused: it is a section and holds keys, as in objective.divergence.KEY=VALUE"
    ),
}


@pytest.mark.parametrize("override", WRONG_VALUES)
def test_a_wrong_value_is_refused_with_field_value_and_what_is_allowed(minimal_file, override):
    field = override.partition("=")[0]
    assert refusal(minimal_file, override) == [f"{field}: {WRONG_VALUES[override]}"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["student.keep_layers=0"], "set exactly one of keep_layers (above 0) and layers, neither is"),
        (["student.layers=[0, 2]"], "set exactly one of keep_layers (above 0) and layers, both are set"),
        (["student.keep_layers=0", "student.layers=[2, 0]"], "layers=[2, 0] must rise, each number once"),
    ],
)
def test_layers_are_named_or_counted(minimal_file, overrides, message):
    assert refusal(minimal_file, *overrides) == [f"student: {message}"]


FINE_TUNING = ["objective.kd_weight=0", "objective.ce_weight=1"]


def test_supervised_fine_tuning_has_no_teacher_and_no_divergence(minimal_file):
    overrides = [*FINE_TUNING, "teacher=null", "student={kind: pretrained, path: /x}", "objective.divergence=null"]
    recipe = read_recipe(str(minimal_file), overrides)
    assert recipe.teacher is None and recipe.objective.divergence is None


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["teacher=null"],
            "recipe: there is no teacher; set teacher.path=PATH, or for supervised fine-tuning objective.kd_weight=0 "
            "objective.ce_weight=1",
        ),
        (
            ["teacher=null", *FINE_TUNING],
            "recipe: student.kind=shrink needs a teacher to shrink; set teacher.path, student.path to the model that "
            "is to be shrunk, or student.kind=pretrained",
        ),
        (
            ["objective.divergence=null"],
            "objective: set exactly one of divergence and calibration, neither is set",
        ),
    ],
)
def test_what_lacks_a_teacher_or_a_divergence_is_refused(minimal_file, overrides, message):
    assert refusal(minimal_file, *overrides) == [message]


UNKNOWN_KEYS = {
    "objective.divergence.alpah=1": "did you mean 'alpha'? known here are alpha, beta, kind",
    "student.keep_layer=2": "did you mean 'keep_layers'? known here are "
    "freeze_embeddings, keep_layers, kind, layers, lora, path",
    "teacher.pth=/x": "did you mean 'path'? known here are adapter, dtype, kind, path, quantization, remember",
    "nonsense=1": f"known here are {SECTIONS}",
}


@pytest.mark.parametrize("override", UNKNOWN_KEYS)
def test_an_unknown_key_is_refused_with_the_known_ones(minimal_file, override):
    field = override.partition("=")[0]
    assert refusal(minimal_file, override) == [f"{field}: unknown key; {UNKNOWN_KEYS[override]}"]


def test_an_unknown_section_is_refused_with_the_one_that_was_meant(minimal_file):
    line = f"tranining: unknown key; did you mean 'training'? known here are {SECTIONS}"
    assert refusal(minimal_file, "tranining.num_steps=3") == [line]


DIVERGENCE_KINDS = (
    "'alpha_beta', 'forward_kl', 'reverse_kl', 'symmetric_kl', 'jsd', 'skewed_forward_kl', 'skewed_reverse_kl', "
    "'total_variation', 'wsd', 'akl', 'bdkd', 'alphanet', 'alpha_mixture'"
)
WRONG_KINDS = {
    "student.kind=tiny": "student.kind: 'tiny' is unknown; use one of 'pretrained', 'shrink'",
    "student={keep_layers: 2}": "student.kind: missing; use one of 'pretrained', 'shrink'",
    "objective.divergence.kind=jensen": (
        f"objective.divergence.kind: 'jensen' is unknown; use one of {DIVERGENCE_KINDS}"
    ),
    "objective.divergence={alpha: 1}": (f"objective.divergence.kind: missing; use one of {DIVERGENCE_KINDS}"),
    "teacher={kind: server, path: x}": (
        "teacher.kind: 'server' is unknown; use one of 'in_process', 'cached', 'served', 'mixture'"
    ),
}


@pytest.mark.parametrize("override", WRONG_KINDS)
def test_a_wrong_kind_is_refused_with_the_right_ones(minimal_file, override):
    assert refusal(minimal_file, override) == [WRONG_KINDS[override]]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["training.num_epochs=2"], "training: set exactly one of num_steps (is 4) and num_epochs (is 2) above 0"),
        (["training.num_steps=0"], "training: set exactly one of num_steps (is 0) and num_epochs (is 0) above 0"),
        (
            ["objective.kd_weight=0"],
            "objective: kd_weight and ce_weight are both 0: nothing to learn; set one above 0",
        ),
        (
            ["data.max_tokens=64", "data.max_prompt_tokens=64"],
            "data: max_tokens=64 leaves no room for a completion after max_prompt_tokens=64; raise it",
        ),
    ],
    ids=["steps and epochs", "neither steps nor epochs", "no weight", "no room for a completion"],
)
def test_fields_that_contradict_each_other_are_refused(minimal_file, overrides, line):
    assert refusal(minimal_file, *overrides) == [line]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["rollouts.kind=on_policy", "teacher.remember=true"], "teacher.remember=true keeps what the teacher says"),
        (["rollouts.kind=on_policy", "objective.ce_weight=1"], "objective.ce_weight=1 is of the data's completions"),
        (["rollouts.kind=mixed", "objective.ce_weight=1", "objective.kd_warmup=0.5"], "objective.kd_warmup=0.5 starts"),
        (["rollouts.kind=adaptive"], "rollouts.kind=adaptive goes by the validation loss; set training.validate_every"),
        (
            ["rollouts.kind=mixed", "objective.kd_weight=0", "objective.ce_weight=1"],
            "rollouts.kind=mixed needs a teach",
        ),
        (["rollouts.kind=mixed", "rollouts.share=1"], "rollouts.share: 1 is refused: input should be less than 1"),
        (["rollouts.kind=on_policy", "rollouts.share=.5"], "rollouts.share: unknown key"),
        (["rollouts.kind=fixed", "rollouts.top_p=.5"], "rollouts.top_p: unknown key"),
        (["rollouts.kind=on_policy", "rollouts.top_p=0"], "rollouts.top_p: 0 is refused: input should be greater than"),
        (["rollouts.kind=onpolicy"], "rollouts.kind: 'onpolicy' is unknown; use one of 'fixed', 'on_policy'"),
    ],
)
def test_rollouts_that_do_not_fit_the_rest_are_refused(minimal_file, overrides, message):
    (line,) = refusal(minimal_file, *overrides)
    assert message in line


def test_a_corpus_and_its_weight_go_together(minimal_file):
    line = "recipe: data.corpus='' and objective.lm_weight=1 go together; set both, or neither"
    assert refusal(minimal_file, "objective.lm_weight=1") == [line]
    (line,) = refusal(minimal_file, "data.corpus=x.txt")
    assert "data.corpus='x.txt' and objective.lm_weight=0 go together" in line


def test_epochs_may_decide_instead_of_steps(minimal_file):
    training = read_recipe(str(minimal_file), ["training.num_steps=0", "training.num_epochs=1.5"]).training
    assert (training.num_steps, training.num_epochs) == (0, 1.5)


def test_every_mistake_has_its_line(minimal_file):
    assert refusal(minimal_file, "objective.temperature=0", "student.kind=tiny", "foo=1") == [
        "student.kind: 'tiny' is unknown; use one of 'pretrained', 'shrink'",
        "objective.temperature: 0 is refused: input should be greater than 0",
        f"foo: unknown key; known here are {SECTIONS}",
    ]


@pytest.mark.parametrize("field", ["teacher.path", "data.train", "training.learning_rate"])
def test_a_missing_field_is_named(field):
    section, key = field.split(".")
    content = MINIMAL | {section: {name: value for name, value in MINIMAL[section].items() if name != key}}
    with pytest.raises(InputError, match=f"^{field}: missing; add it to the recipe or the command line$"):
        parse_recipe(content)


# Overrides


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training", "override: 'training' is not key=value, as in training.learning_rate=1e-4"),
        ("=3", "override: '=3' is not key=value, as in training.learning_rate=1e-4"),
        ("data.train=[1", "data.train: '[1' is not a YAML value; quote it"),
        ("run_dir=a: b: c", "run_dir: 'a: b: c' is not a YAML value; quote it"),
        ("training.num_steps.x=3", "training.num_steps.x: 'num_steps' is a single value, not a section"),
    ],
    ids=["no equals sign", "no key", "torn value", "two colons", "below a value"],
)
def test_a_malformed_override_is_refused(minimal_file, override, line):
    assert refusal(minimal_file, override) == [line]


def test_overrides_set_single_values_and_the_rest_stays(minimal_file):
    before = read_recipe(str(minimal_file)).model_dump()
    overrides = ["training.learning_rate=1e-4", "data.validation=", "evaluation.num_generated=3", "resume=true"]
    after = read_recipe(str(minimal_file), [*overrides, "run_dir=a=b"]).model_dump()
    assert after["training"] == before["training"] | {"learning_rate": 1e-4}
    assert after["evaluation"] == before["evaluation"] | {"num_generated": 3}
    assert (after["resume"], after["run_dir"], after["data"]["validation"]) == (True, "a=b", "")
    assert all(after[name] == before[name] for name in ("task", "teacher", "student", "data", "objective"))


def test_the_last_of_two_overrides_counts(minimal_file):
    assert read_recipe(str(minimal_file), ["training.seed=1", "training.seed=2"]).training.seed == 2


def test_an_override_reaches_into_a_section_that_the_file_leaves_empty(minimal_file):
    minimal_file.write_text(minimal_file.read_text(encoding="utf-8") + "\nevaluation:\n", encoding="utf-8")
    assert read_recipe(str(minimal_file), ["evaluation.batch_size=3"]).evaluation.batch_size == 3


def test_another_kind_starts_its_section_afresh(minimal_file):
    student = read_recipe(str(minimal_file), ["student.kind=pretrained", "student.path=/s"]).student
    assert student.model_dump() == {
        "kind": "pretrained", "path": "/s", "adapter": "", "lora": None, "freeze_embeddings": False
    }  # fmt: skip
    assert refusal(minimal_file, "student.kind=pretrained") == [
        "student.path: missing; add it to the recipe or the command line"
    ]


def test_a_kind_comes_before_its_fields_wherever_it_stands(minimal_file):
    overrides = ["student.path=/s", "student.kind=pretrained"]
    assert read_recipe(str(minimal_file), overrides) == read_recipe(str(minimal_file), overrides[::-1])


def test_the_same_kind_keeps_its_section(minimal_file):
    assert read_recipe(str(minimal_file), ["student.kind=shrink"]) == read_recipe(str(minimal_file))


def test_another_divergence_drops_alpha_and_beta(minimal_file):
    minimal_file.write_text(yaml.safe_dump(MINIMAL | {"objective": {"divergence": {"kind": "alpha_beta", "alpha": 1}}}))
    divergence = read_recipe(str(minimal_file), ["objective.divergence.kind=reverse_kl"]).objective.divergence
    assert divergence.model_dump() == {"kind": "reverse_kl"}


# Files


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "must hold sections such as teacher, student, data; it holds None"),
        (b"- a", "must hold sections such as teacher, student, data; it holds ['a']"),
        (b"task: a\ndata: b: c", ", line 2 is not valid YAML: mapping values are not allowed here"),
        (b"task: \xff", " is not valid YAML: 'utf-8' codec can't decode byte 0xff in position 6: invalid start byte"),
        (b"task: \x00", " is not valid YAML: unacceptable character #x0000: special characters are not allowed"),
        (b"task: !!python/none", ", line 1 is not valid YAML: could not determine a constructor for the tag"),
    ],
    ids=["empty", "a list", "two colons", "not UTF-8", "a control character", "a Python tag"],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(tmp_path, content, reason):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    (line,) = refusal(file)
    assert line.startswith(f"recipe: {file}")
    assert reason in line


def test_a_recipe_that_is_not_there_is_refused_with_the_shipped_names():
    assert refusal("dmeo") == [
        "recipe: there is no shipped recipe or file 'dmeo'; did you mean 'demo'? shipped are "
        + ", ".join(name for name in recipe_names() if "/" not in name)
    ]
    (line,) = refusal("/no/such.yaml")
    assert line.startswith(
        "recipe: there is no shipped recipe or file '/no/such.yaml'; shipped are demo, cifar100_alone"
    )


@pytest.mark.parametrize("name", [name for name in recipe_names() if "/" not in name])
def test_a_shipped_recipe_loads_and_what_it_ships_is_there(name):
    recipe = read_recipe(name)
    assert recipe_names()[name]
    for path in (recipe.data.train, getattr(recipe.data, "validation", "")):
        assert not path.startswith("package:abkd/") or find_path(path, "data").is_file()


def test_the_list_of_recipes_is_that_of_the_folder():
    found = {str(file.relative_to(RECIPES)).removesuffix(".yaml") for file in Path(RECIPES).rglob("*.yaml")}
    assert set(recipe_names()) == found
    assert recipe_names()["demo"].startswith("SmolLM2-135M-Instruct")


# The resolved recipe


def test_the_resolved_recipe_names_every_option_of_config(minimal_file):
    text = read_recipe(str(minimal_file)).to_yaml()
    for option in ("remember: false", "weight_decay: 0.01", "max_new_tokens: 128", "temperature: 1.0", "alpha: 0.2"):
        assert re.search(rf"^ +{re.escape(option)}$", text, flags=re.MULTILINE), option


FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(codec="utf-8"), min_size=1)
RECIPE_CONTENTS = st.fixed_dictionaries(
    {
        "task": st.just("language_model"),
        "teacher": st.fixed_dictionaries({"path": TEXT, "remember": st.booleans()}),
        "student": st.one_of(
            st.fixed_dictionaries({"kind": st.just("shrink"), "keep_layers": st.integers(1)}),
            st.fixed_dictionaries({"kind": st.just("pretrained"), "path": TEXT}),
        ),
        "data": st.fixed_dictionaries({"train": TEXT, "validation": st.text(st.characters(codec="utf-8"))}),
        "objective": st.fixed_dictionaries(
            {
                "divergence": st.one_of(
                    st.fixed_dictionaries({"kind": st.just("alpha_beta"), "alpha": FINITE, "beta": FINITE}),
                    st.just({"kind": "forward_kl"}),
                )
            }
        ),
        "training": st.fixed_dictionaries(
            {"num_steps": st.integers(1), "learning_rate": st.floats(1e-300, 1e300), "seed": st.integers(0)}
        ),
        "run_dir": TEXT,
    }
)


@settings(max_examples=60, deadline=None)
@given(content=RECIPE_CONTENTS)
@example(content=MINIMAL | {"run_dir": "caf\u00e9\u0085\U0001f600"})
def test_a_resolved_recipe_reads_back_equal(content, tmp_path_factory):
    recipe = parse_recipe(content)
    file = tmp_path_factory.getbasetemp() / "resolved.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    again = read_recipe(str(file))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


def test_a_recipe_cannot_be_changed_in_place(minimal_file):
    with pytest.raises(ValueError, match="frozen"):
        read_recipe(str(minimal_file)).training.seed = 3


RAMPS = {
    "{from: 0.8}": "objective.divergence.alpha.to: missing; add it to the recipe or the command line",
    "{from: 0.8, to: x}": (
        "objective.divergence.alpha.to: 'x' is refused: input should be a valid number, "
        "unable to parse string as a number"
    ),
    "{from: 0.8, to: 0.2, shap: linear}": (
        "objective.divergence.alpha.shap: unknown key; did you mean 'shape'? known here are from, shape, to"
    ),
}


@pytest.mark.parametrize("ramp", RAMPS)
def test_a_wrong_ramp_is_refused_in_one_line(minimal_file, ramp):
    assert refusal(minimal_file, f"objective.divergence={{kind: alpha_beta, alpha: {ramp}}}") == [RAMPS[ramp]]


def test_a_ramp_survives_the_resolved_recipe(minimal_file):
    ramp = "{from: 0.8, to: 0.2, shape: cosine}"
    recipe = read_recipe(str(minimal_file), [f"objective.divergence={{kind: alpha_beta, alpha: {ramp}}}"])
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    assert recipe.to_dict()["objective"]["divergence"]["alpha"] == {"from": 0.8, "to": 0.2, "shape": "cosine"}


@pytest.mark.parametrize(
    "section, line",
    [
        ("{kind: skewed_reverse_kl, mix: 1}", "mix=1 is reverse_kl"),
        ("{kind: bdkd, gain: 1}", "gain=1 is symmetric_kl"),
        ("{kind: wsd, reverse_weight: 0}", "reverse_weight=0 is forward_kl times the other weight"),
        ("{kind: akl, head_mass: 0}", "all in the tail reverse_kl"),
    ],
)
def test_a_parameter_out_of_range_is_refused_with_the_way_out(minimal_file, section, line):
    (found,) = refusal(minimal_file, f"objective.divergence={section}")
    assert found.startswith("objective.divergence: ")
    assert found.endswith(line)


CALIBRATION = "objective.calibration={kind: dkd, divergence: {kind: alpha_beta, alpha: 0.8, beta: 0.3}}"


def test_a_calibration_takes_the_place_of_the_divergence_in_one_line(minimal_file):
    recipe = read_recipe(str(minimal_file), ["objective.divergence=null", CALIBRATION])
    assert recipe.objective.calibration.divergence.alpha == 0.8
    assert recipe.objective.calibration.nontarget_weight == 8.0
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    "overrides, line",
    [
        (
            [CALIBRATION],
            "objective: set exactly one of divergence and calibration, both are; drop one with "
            "objective.divergence=null",
        ),
        (
            ["objective.divergence=null"],
            "objective: set exactly one of divergence and calibration, neither is set",
        ),
        (
            ["objective.divergence=null", CALIBRATION, "objective.temperature=4"],
            "objective: temperature=4.0 belongs to objective.divergence; the calibration has its own: "
            "see objective.calibration",
        ),
        (
            ["objective.divergence=null", "objective.calibration={kind: dkt}"],
            "objective.calibration.kind: 'dkt' is unknown; use one of 'dkd', 'lsd', 'ttm', 'wttm', 'dist', 'mlkd'",
        ),
        (
            ["objective.divergence=null", "objective.calibration={kind: ttm, exponnent: 1}"],
            "objective.calibration.exponnent: unknown key; did you mean 'exponent'? known here are divergence, "
            "exponent, kind",
        ),
        (
            ["objective.divergence=null", "objective.calibration={kind: lsd, divergence: {kind: jsd, mix: 1}}"],
            "objective.calibration.divergence: mix must lie between 0 and 1, both excluded, got 1.0; mix=0 is 0 "
            "whatever the student, and divided by mix it is forward_kl; mix=1 is 0, and divided by 1 - mix it is "
            "reverse_kl",
        ),
        (
            ["objective.divergence=null", "objective.calibration={kind: lsd, divergence: {kind: kl}}"],
            "objective.calibration.divergence.kind: 'kl' is unknown; use one of " + DIVERGENCE_KINDS,
        ),
        (
            ["objective.divergence=null", "objective.calibration={kind: dkd, target_weight: 0, nontarget_weight: 0}"],
            "objective.calibration: target_weight and nontarget_weight are both 0: nothing to learn; set one above 0",
        ),
        (
            ["objective.divergence=null", "objective.calibration={kind: mlkd, temperatures: [2, 0]}"],
            "objective.calibration.temperatures.1: 0 is refused: input should be greater than 0",
        ),
        (
            ["objective.divergence=null", "objective.calibration={kind: mlkd, temperatures: []}"],
            "objective.calibration.temperatures: [] is refused: tuple should have at least 1 item after validation, "
            "not 0",
        ),
        (
            ["objective.divergence=null", "objective.calibration={kind: dist, divergence: {kind: forward_kl}}"],
            "objective.calibration.divergence: unknown key; known here are inter_weight, intra_weight, kind, "
            "temperature, temperature_gradient_scale",
        ),
        (["objective.kd_weight=true"], "objective.kd_weight: true is refused: input should be a number"),
        (["objective.divergence.alpha=true"], "objective.divergence.alpha: true is refused: input should be a number"),
        (
            ["objective.temperature=1e200"],
            "objective: temperature must be above 0, between 1e-6 and 1e6, got 1e+200",
        ),
        (["objective.kd_warmup=2"], "objective.kd_warmup: 2 is refused: input should be less than or equal to 1"),
        (
            ["objective.kd_warmup=0.1"],
            "objective: kd_warmup=0.1 raises kd_weight against ce_weight, and ce_weight is 0; set ce_weight above 0, "
            "or warm the learning rate up instead",
        ),
    ],
)
def test_a_mistaken_calibration_is_one_line(minimal_file, overrides, line):
    assert refusal(minimal_file, *overrides) == [line]
