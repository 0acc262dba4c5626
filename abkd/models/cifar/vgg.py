"""VGG with batch normalisation, and one linear layer where the original has three.

Source: Simonyan and Zisserman, "Very deep convolutional networks", ICLR 2015, Table 1, columns A, B, D and E.
"""

from collections.abc import Sequence

from torch import nn

from abkd.models.cifar.layers import he_normal, mean_over_the_image, named, small_linear

WIDTHS = (64, 128, 256, 512, 512)


def vgg(depths: Sequence[int], num_classes: int) -> nn.Sequential:
    """Five blocks of 3x3 convolutions; the first three halve the image, the last ends in the mean over it.

    Args:
        depths: convolutions in each block.
    """
    parts: dict[str, nn.Module] = {}
    for index, (channels, width, depth) in enumerate(zip((3, *WIDTHS), WIDTHS, depths, strict=False)):
        parts[f"block{index}"] = _block(channels, width, depth)
        parts[f"relu{index}"] = nn.ReLU()
        if index < 3:
            parts[f"pool{index}"] = nn.MaxPool2d(2)
    network = named(**parts, pool=mean_over_the_image(), classifier=small_linear(WIDTHS[-1], num_classes))
    he_normal(network)
    return network


def _block(channels: int, width: int, depth: int) -> nn.Sequential:
    """`depth` times convolution and normalisation, with ReLU in between."""
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Conv2d(channels if index == 0 else width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
