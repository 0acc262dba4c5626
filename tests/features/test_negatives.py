import pytest
import torch

from abkd.errors import InputError
from abkd.features.negatives import OtherClasses

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 4, 4, 1, 0])


def test_draws_are_of_other_classes_uniformly():
    ids = torch.arange(len(LABELS))
    drawn = OtherClasses(LABELS, len(LABELS)).draw(ids, torch.randint(2**62, (len(ids), 40_000)))
    assert drawn.shape == (len(ids), 40_000)
    for example, row in zip(ids.tolist(), drawn, strict=True):
        counts = row.bincount(minlength=len(LABELS)).double()
        others = LABELS[example] != LABELS
        assert counts[~others].sum() == 0
        expected = 40_000 / others.sum()
        assert (counts[others] - expected).abs().max() < 5 * expected.sqrt()


def test_its_tables_are_no_part_of_the_state():
    assert not OtherClasses(LABELS, len(LABELS)).state_dict()


@pytest.mark.parametrize(
    "labels, message",
    [
        (None, "negatives=other_classes needs the labels of the training data; set negatives=all"),
        (LABELS[:3], r"labels must be int64 \[num_examples\] = \[12\], got torch.int64 \[3\]"),
        (LABELS.double(), r"got torch.float64 \[12\]"),
        (torch.zeros(12, dtype=torch.long), "negatives=other_classes needs two classes, got 1; set negatives=all"),
    ],
)
def test_mistaken_labels_are_refused(labels, message):
    with pytest.raises(InputError, match=message):
        OtherClasses(labels, 12)
