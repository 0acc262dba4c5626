"""What a search can go by."""

import pytest
from test_points import recipe_of

from abkd import InputError
from abkd.recipe import read_recipe
from abkd.tune.metrics import find_metric, metrics_of

SETS = {"sets": {"dolly": {"path": "d.jsonl"}}, "num_generated": 2}


def test_each_task_has_its_metrics_and_a_default_that_is_no_divergence():
    assert find_metric(recipe_of(), None).name == "token_agreement"
    assert find_metric(read_recipe("resnet56_resnet20"), None).name == "top1"
    assert "next_token_loss" not in metrics_of(read_recipe("resnet56_resnet20"))


def test_the_direction_of_every_metric():
    language = metrics_of(recipe_of(evaluation=SETS))
    assert {name for name, metric in language.items() if metric.greater_is_better} == {
        "token_agreement", "rouge_l", "sets_mean", "sets.dolly"
    }  # fmt: skip
    images = metrics_of(read_recipe("resnet56_resnet20"))
    assert {name for name, metric in images.items() if metric.greater_is_better} == {"top1", "top5", "agreement"}
    assert language["rouge_l"].is_better(2, 1) and language["forward_kl"].is_better(1, 2)
    assert sorted([3.0, 1.0, 2.0], key=language["rouge_l"].best_first) == [3, 2, 1]
    assert sorted([3.0, 1.0, 2.0], key=language["forward_kl"].best_first) == [1, 2, 3]


def test_the_value_of_a_metric_is_the_trained_students():
    results = {"before": {"rouge_l": 1.0}, "after": {"rouge_l": 20.5, "sets": {"dolly": {"mean": 7.5, "sd": None}}}}
    metrics = metrics_of(recipe_of(evaluation=SETS))
    assert metrics["rouge_l"].of(results) == 20.5 and metrics["sets.dolly"].of(results) == 7.5


@pytest.mark.parametrize(
    "name, message",
    [
        ("rouge", "'rouge' is unknown; did you mean 'rouge_l'? known here are token_agreement, forward_kl"),
        ("top1", "'top1' is unknown; known here are"),
        ("sets.dolly", "'sets.dolly' is unknown; "),
        ("rouge_l", "rouge_l is not measured under this recipe; it needs evaluation.num_generated above 0"),
        ("sets_mean", "sets_mean is not measured under this recipe; it needs evaluation.sets"),
    ],
)
def test_a_metric_that_the_recipe_does_not_produce_is_refused(name, message):
    with pytest.raises(InputError) as refused:
        find_metric(recipe_of(), name)
    assert str(refused.value).startswith(f"--metric: {message}")
