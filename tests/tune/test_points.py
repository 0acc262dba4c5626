"""What a trial changes in a recipe, and what it leaves."""

from pathlib import Path

import pytest
import yaml

from abkd import InputError
from abkd.recipe import parse_recipe, read_recipe
from abkd.tune.points import Point, at, divergence_path, fixed

LANGUAGE = """
task: language_model
teacher: {path: t}
student: {kind: shrink, keep_layers: 2}
data: {train: d.jsonl}
objective: {divergence: {kind: alpha_beta, alpha: 0.2, beta: 0.7}}
training: {num_steps: 90, warmup_steps: 10, learning_rate: 1.0e-3, seed: 3}
run_dir: r
"""
CALIBRATED = {"calibration": {"kind": "dkd", "divergence": {"kind": "alpha_beta"}}, "ce_weight": 1.0}


def recipe_of(**changed):
    return parse_recipe(yaml.safe_load(LANGUAGE) | changed)


def changed_keys(one, other):
    one, other = (fixed_all(each) for each in (one, other))
    return {key for key in one | other if one.get(key) != other.get(key)}


def fixed_all(recipe):
    """Every key of a recipe, flat, by hand."""
    found = {}

    def walk(section, prefix):
        for key, value in section.items():
            walk(value, f"{prefix}{key}.") if isinstance(value, dict) else found.update({f"{prefix}{key}": value})

    walk(recipe.to_dict(), "")
    return found


def test_a_point_changes_alpha_and_beta_and_nothing_else():
    recipe = recipe_of()
    trial = at(recipe, Point(0.3, 0.6), run_dir=Path("r/trials/000"))
    assert (trial.objective.divergence.alpha, trial.objective.divergence.beta) == (0.3, 0.6)
    assert trial.run_dir == "r/trials/000"
    assert changed_keys(recipe, trial) == {"objective.divergence.alpha", "objective.divergence.beta", "run_dir"}
    assert recipe == recipe_of()


def test_rate_and_seed_where_they_are_asked_for():
    trial = at(recipe_of(), Point(0.2, 0.7, 5e-4), run_dir=Path("r"), seed=8)
    assert (trial.training.learning_rate, trial.training.seed) == (5e-4, 8)
    assert changed_keys(recipe_of(), trial) == {"training.learning_rate", "training.seed"}


def test_the_divergence_of_a_calibration_is_found():
    recipe = recipe_of(objective=CALIBRATED)
    assert divergence_path(recipe) == ("objective", "calibration", "divergence")
    trial = at(recipe, Point(0.8, 0.3), run_dir=Path("r"))
    section = trial.objective.calibration
    assert (section.divergence.alpha, section.divergence.beta, section.nontarget_weight) == (0.8, 0.3, 8.0)


def test_a_short_run_has_the_schedule_of_the_whole_one_in_less_time():
    steps = at(recipe_of(), Point(0.2, 0.7), run_dir=Path("r"), share=1 / 9).training
    assert (steps.num_steps, steps.warmup_steps, steps.num_epochs) == (10, 1, 0)
    few = recipe_of(training={"num_steps": 90, "warmup_steps": 2, "learning_rate": 1e-3})
    assert at(few, Point(0.2, 0.7), run_dir=Path("r"), share=1 / 9).training.warmup_steps == 1
    epochs = recipe_of(training={"num_epochs": 3, "learning_rate": 1e-3})
    short = at(epochs, Point(0.2, 0.7), run_dir=Path("r"), share=1 / 3).training
    assert (short.num_epochs, short.num_steps, short.warmup_steps) == (1, 0, 0)


def test_an_image_recipes_milestones_shrink_too():
    recipe = read_recipe("resnet56_resnet20+methods/abkd")
    short = at(recipe, Point(0.8, 0.3), run_dir=Path("r"), share=1 / 3).training
    assert recipe.training.num_epochs == 240 and recipe.training.milestones == (150, 180, 210)
    assert short.num_epochs == pytest.approx(80) and short.milestones == pytest.approx((50, 60, 70))


@pytest.mark.parametrize(
    "objective, message",
    [
        ({"divergence": {"kind": "forward_kl"}}, "objective.divergence.kind=forward_kl has no alpha and beta to tune; "
         "set objective.divergence.kind=alpha_beta"),
        ({"calibration": {"kind": "ttm"}, "ce_weight": 1}, "objective.calibration.divergence.kind=forward_kl has no"),
        ({"calibration": {"kind": "dist"}, "ce_weight": 1}, "objective.calibration.kind=dist has no divergence to"),
        ({"kd_weight": 0, "ce_weight": 1}, "objective.kd_weight: 0 leaves no divergence to tune; set it above 0"),
        ({"divergence": {"kind": "alpha_beta", "alpha": {"from": 0.8, "to": 0.2}}},
         "objective.divergence.alpha: moves during training, and a trial sets a number"),
    ],
)  # fmt: skip
def test_a_recipe_without_numbers_to_tune_is_refused(objective, message):
    with pytest.raises(InputError) as refused:
        divergence_path(recipe_of(objective=objective))
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_what_trials_share_is_everything_but_what_they_change():
    shared = fixed(recipe_of(), without_rate=False)
    left_out = {"objective.divergence.alpha", "objective.divergence.beta", "run_dir", "resume"}
    assert set(fixed_all(recipe_of())) - set(shared) == left_out
    assert shared["training.num_steps"] == 90 and shared["training.learning_rate"] == 1e-3
    assert "training.learning_rate" not in fixed(recipe_of(), without_rate=True)
    for other in (Point(0.1, 0.1), Point(1, 0)):
        assert fixed(at(recipe_of(), other, run_dir=Path("elsewhere")), without_rate=False) == shared


def test_a_point_names_its_coordinates():
    assert str(Point(0.2, 0.7)) == "alpha=0.2 beta=0.7"
    assert str(Point(0.2, 0.7, 5e-4)) == "alpha=0.2 beta=0.7 learning_rate=0.0005"
