"""Residual networks: of basic blocks as in He et al.'s CIFAR experiments, and ResNet-50 with a CIFAR stem.

Source: He et al., "Deep residual learning for image recognition", CVPR 2016, sections 3.3 and 4.2.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn.functional import pad, relu

from abkd.models.cifar.layers import blocks_in_a_stage, conv, he_normal, mean_over_the_image, named, projection, stage

Shortcut = Callable[[int, int, int], nn.Module]


class PaddedShortcut(nn.Module):
    """Option A, without weights: every `stride`-th pixel, and channels of zeros on both sides up to `width`."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.stride, self.before = stride, (width - channels) // 2
        self.after = width - channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + downsample(x)), both convolutions 3x3."""

    def __init__(self, channels: int, width: int, stride: int, shortcut: Shortcut):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)): 1x1, 3x3 and 1x1, a quarter inside."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        inside = width // 4
        self.conv1, self.bn1 = conv(channels, inside, 1), nn.BatchNorm2d(inside)
        self.conv2, self.bn2 = conv(inside, inside, 3, stride), nn.BatchNorm2d(inside)
        self.conv3, self.bn3 = conv(inside, width, 1), nn.BatchNorm2d(width)
        self.shortcut = projection(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        out = relu(self.bn2(self.conv2(out)))
        return relu(self.bn3(self.conv3(out)) + self.shortcut(x))


def resnet(
    depth: int, widths: Sequence[int], num_classes: int, *, shortcut: Shortcut = projection, head: str = "fc"
) -> nn.Sequential:
    """A stem and three stages of (depth - 2) / 6 basic blocks, the two last of them halving the image.

    Args:
        widths: channels of the stem and of the three stages.
        shortcut: where a stage changes the shape.
        head: name of the linear layer in the state dict.
    """
    num_blocks = blocks_in_a_stage(depth, 2)
    stem, first, second, third = widths
    block = partial(BasicBlock, shortcut=shortcut)
    network = named(
        conv1=conv(3, stem, 3),
        bn1=nn.BatchNorm2d(stem),
        relu=nn.ReLU(),
        layer1=stage(block, stem, first, num_blocks),
        layer2=stage(block, first, second, num_blocks, stride=2),
        layer3=stage(block, second, third, num_blocks, stride=2),
        pool=mean_over_the_image(),
        **{head: nn.Linear(third, num_classes)},
    )
    he_normal(network)
    return network


def resnet_a(depth: int, num_classes: int) -> nn.Sequential:
    """The network of He et al.'s section 4.2 itself: option A, so that the shortcuts hold no weights."""

    def shortcut(channels: int, width: int, stride: int) -> nn.Module:
        return nn.Identity() if (channels, stride) == (width, 1) else PaddedShortcut(channels, width, stride)

    return resnet(depth, (16, 16, 32, 64), num_classes, shortcut=shortcut, head="linear")


def resnet50(num_classes: int) -> nn.Sequential:
    """3 + 4 + 6 + 3 bottlenecks after a stem of one 3x3 convolution that keeps the image's size."""
    network = named(
        conv1=conv(3, 64, 3),
        bn1=nn.BatchNorm2d(64),
        relu=nn.ReLU(),
        layer1=stage(Bottleneck, 64, 256, 3),
        layer2=stage(Bottleneck, 256, 512, 4, stride=2),
        layer3=stage(Bottleneck, 512, 1024, 6, stride=2),
        layer4=stage(Bottleneck, 1024, 2048, 3, stride=2),
        pool=mean_over_the_image(),
        linear=nn.Linear(2048, num_classes),
    )
    he_normal(network)
    return network
