import math

import pytest
import torch

from abkd.models.clip_files import Prompts
from abkd.models.promptsrc import epoch_weights, self_regularization, weighted_average


def units(rows, dim, seed):
    found = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return found / found.norm(dim=1, keepdim=True)


def test_the_regularization_is_the_sum_by_hand():
    image, frozen_image, text, frozen_text = (units(rows, 6, seed) for seed, rows in enumerate((5, 5, 3, 3)))
    scale = torch.tensor(20.0, dtype=torch.float64)
    expected = 0.0
    for weight, prompted, frozen in ((10, image, frozen_image), (25, text, frozen_text)):
        pairs = list(zip(prompted.flatten().tolist(), frozen.flatten().tolist(), strict=True))
        expected += weight * sum(abs(a - b) for a, b in pairs) / len(pairs)
    for row in range(5):
        tables = []
        for images, texts in ((frozen_image, frozen_text), (image, text)):
            powers = [math.exp(20 * float(images[row] @ texts[k])) for k in range(3)]
            tables.append([power / sum(powers) for power in powers])
        expected += sum(p * math.log(p / q) for p, q in zip(*tables, strict=True)) / 15
    found = self_regularization(image=image, frozen_image=frozen_image, text=text, frozen_text=frozen_text, scale=scale)
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_nothing_is_asked_of_frozen_features_themselves():
    image, text = units(4, 6, 0), units(3, 6, 1)
    found = self_regularization(image=image, frozen_image=image, text=text, frozen_text=text, scale=torch.tensor(100.0))
    assert found.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("num_epochs, mean, sd", [(20, 15, 1), (50, 30, 30), (5, 15, 1)])
def test_epoch_weights_are_a_gaussian(num_epochs, mean, sd):
    raw = [math.exp(-((epoch - mean) ** 2) / (2 * sd**2)) for epoch in range(1, num_epochs + 1)]
    assert epoch_weights(num_epochs, mean, sd) == pytest.approx([each / sum(raw) for each in raw], rel=1e-9)


def test_the_average_is_weighted():
    several = [Prompts(torch.full((2, 1, 3), float(n)), torch.full((1, 2, 4), 10.0 * n)) for n in (1, 2, 4)]
    found = weighted_average(several, [0.5, 0.25, 0.25])
    assert torch.equal(found.vision, torch.full((2, 1, 3), 2.0)) and torch.equal(
        found.text, torch.full((1, 2, 4), 20.0)
    )
