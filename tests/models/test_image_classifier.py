"""A network with the normalisation of its own images."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from abkd.errors import InputError
from abkd.models.classifier_spec import ClassifierSpec
from abkd.models.image_classifier import ImageClassifier

MEAN, STD = (0.5, 0.25, 0.125), (0.2, 0.5, 2.0)


def spec(size=None, classes=("a", "b", "c")):
    return ClassifierSpec("cifar", "resnet8", 3, MEAN, STD, size, classes)


class Means(nn.Module):
    """The mean of each channel, weighted: three classes."""

    def __init__(self, wrap=lambda logits: logits):
        super().__init__()
        self.weight, self.wrap = nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), wrap

    def forward(self, x):
        self.seen = x
        return self.wrap(x.mean(dim=(2, 3)) * self.weight)


def test_images_are_normalised_channel_by_channel():
    images = torch.rand(2, 3, 4, 6)
    network = Means()
    logits = ImageClassifier(network, spec())(images)
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        expected = torch.tensor([[(x.item() - mean) / std for x in image[channel].flatten()] for image in images])
        torch.testing.assert_close(network.seen[:, channel].flatten(1), expected)
        torch.testing.assert_close(logits[:, channel], expected.mean(1) * (channel + 1))


def test_the_output_of_transformers_is_unwrapped():
    images = torch.rand(2, 3, 4, 4)
    wrapped = ImageClassifier(Means(lambda logits: SimpleNamespace(logits=logits)), spec())
    assert torch.equal(wrapped(images), ImageClassifier(Means(), spec())(images))


def test_what_it_says_of_itself():
    classifier = ImageClassifier(Means(), spec(size=8))
    assert (classifier.num_classes, classifier.classes, classifier.size) == (3, ("a", "b", "c"), 8)


def test_the_state_dict_is_the_networks_alone():
    classifier = ImageClassifier(Means(), spec())
    assert list(classifier.state_dict()) == ["network.weight"]
    assert list(classifier.network.state_dict()) == ["weight"]
    assert [name for name, _ in classifier.named_parameters()] == ["network.weight"]


def test_images_are_resized_with_antialiasing_before_they_are_normalised():
    """Halving by the triangle filter of width 4: weights 1, 3, 3, 1 along each axis, where they reach no border."""
    images = torch.rand(1, 3, 12, 12, dtype=torch.float64)
    network = Means()
    ImageClassifier(network, spec(size=6)).double()(images)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    patch = images[:, :, 3:7, 5:9]  # around output row 2, column 3
    expected = (torch.einsum("bchw,h,w->bc", patch, taps, taps) - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(network.seen[:, :, 2, 3], expected, rtol=1e-6, atol=1e-6)
    assert network.seen.shape == (1, 3, 6, 6)


def test_images_of_the_right_size_are_not_touched():
    images = torch.rand(2, 3, 8, 8)
    plain, sized = Means(), Means()
    ImageClassifier(plain, spec())(images), ImageClassifier(sized, spec(size=8))(images)
    assert torch.equal(plain.seen, sized.seen)


def test_a_constant_image_stays_constant_when_it_is_resized():
    network = Means()
    ImageClassifier(network, spec(size=7))(torch.full((1, 3, 5, 11), 0.5))
    expected = ((0.5 - torch.tensor(MEAN)) / torch.tensor(STD)).view(1, 3, 1, 1).expand(1, 3, 7, 7)
    torch.testing.assert_close(network.seen, expected, rtol=1e-5, atol=1e-6)


def test_gradients_reach_weights_and_images():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    classifier = ImageClassifier(Means(), spec())
    classifier(images).sum().backward()
    expected = torch.tensor([(channel + 1) / STD[channel] / 16 for channel in range(3)]).view(3, 1, 1)
    torch.testing.assert_close(images.grad, expected.expand(2, 3, 4, 4))
    assert classifier.network.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_of_another_dtype_takes_the_same_images(dtype):
    images = torch.rand(4, 3, 5, 5)
    classifier = ImageClassifier(Means(), spec())
    converted = copy.deepcopy(classifier).to(dtype)
    logits = converted(images)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), classifier(images), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "torch.uint8 [2, 3, 4, 4]"),
        (torch.zeros(3, 4, 4), "torch.float32 [3, 4, 4]"),
        (torch.zeros(2, 4, 4, 3), "torch.float32 [2, 4, 4, 3]"),
        (torch.zeros(2, 1, 4, 4), "torch.float32 [2, 1, 4, 4]"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images, got):
    with pytest.raises(InputError) as caught:
        ImageClassifier(Means(), spec())(images)
    assert str(caught.value) == (
        f"pixel_values must be [batch, 3, height, width] in 0..1, got {got}; divide whole numbers by 255"
    )


def test_an_empty_batch_gives_no_logits():
    assert ImageClassifier(Means(), spec())(torch.zeros(0, 3, 4, 4)).shape == (0, 3)
