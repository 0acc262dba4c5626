import pytest
import torch

from abkd import ForwardKL
from abkd.evaluation.base_and_new import BaseToNewMeter
from abkd.evaluation.classification import ClassificationMeter

LOGITS = torch.tensor([[3.0, 2.0, 9.0, 0.0], [1.0, 2.0, 9.0, 0.0], [9.0, 1.0, 2.0, 3.0], [9.0, 1.0, 4.0, 3.0]])
LABELS = torch.tensor([0, 0, 2, 2])


def meter_of(logits, labels, size=4, base=range(2), new=range(2, 4)):
    meter = BaseToNewMeter(base, new)
    for part in zip(logits.split(size), labels.split(size), strict=True):
        meter.add(*part)
    return meter


def test_each_part_is_measured_among_its_own_classes():
    """Among all classes every image is taken for one of the other part; among their own, half of each are right."""
    result = meter_of(LOGITS, LABELS).result()
    assert result["top1"] == 0
    assert (result["base_accuracy"], result["new_accuracy"], result["harmonic_mean"]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("size", [1, 7, 50])
def test_batches_add_up_to_a_loop_over_images(size):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 7, generator=generator), torch.randint(7, (50,), generator=generator)
    result = meter_of(logits, labels, size, range(4), range(4, 7)).result()
    right = {"base": [], "new": []}
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        own = range(4) if label < 4 else range(4, 7)
        right["base" if label < 4 else "new"].append(max(own, key=row.__getitem__) == label)
    base, new = (sum(each) / len(each) for each in right.values())
    assert result["base_accuracy"] == pytest.approx(base) and result["new_accuracy"] == pytest.approx(new)
    assert result["harmonic_mean"] == pytest.approx(2 / (1 / base + 1 / new))


def test_the_rest_is_that_of_every_classifier():
    whole, parts = ClassificationMeter({"kl": ForwardKL()}), BaseToNewMeter(range(2), range(2, 4), {"kl": ForwardKL()})
    for meter in (whole, parts):
        meter.add(LOGITS, LABELS, LOGITS.flip(1))
    added = {"base_accuracy", "new_accuracy", "harmonic_mean"}
    result = parts.result(("a", "b", "c", "d"))
    assert {key: value for key, value in result.items() if key not in added} == whole.result(("a", "b", "c", "d"))


def test_without_images_of_a_part_its_accuracy_is_not_known():
    result = meter_of(LOGITS[:2], LABELS[:2]).result()
    assert result["base_accuracy"] == 0.5
    assert result["new_accuracy"] is None and result["harmonic_mean"] is None
