"""ShuffleNet V1 and V2 for 32 x 32 images: a 1x1 stem that keeps the image's size, then the papers' stages.

Source: Zhang et al., "ShuffleNet", CVPR 2018, Table 1, 3 groups; Ma et al., "ShuffleNet V2", ECCV 2018, Table 5, 1x.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from abkd.models.cifar.layers import conv, mean_over_the_image, named, stage

STEM = 24


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel i of group g, g * n + i, becomes channel i * groups + g."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class GroupedBlock(nn.Module):
    """relu(y + x), y = bn3(conv3(relu(bn2(conv2(shuffle(relu(bn1(conv1(x)))))))); with stride 2, relu([y, mean of x]).

    1x1 and 1x1 in groups, but for the stem's channels that are too few for it; 3x3 on each channel alone.
    """

    def __init__(self, channels: int, width: int, stride: int, groups: int = 3):
        super().__init__()
        self.stride = stride
        self.groups = 1 if channels == STEM else groups
        made = width if stride == 1 else width - channels
        inside = made // 4
        self.conv1, self.bn1 = conv(channels, inside, 1, groups=self.groups), nn.BatchNorm2d(inside)
        self.conv2, self.bn2 = conv(inside, inside, 3, stride, groups=inside), nn.BatchNorm2d(inside)
        self.conv3, self.bn3 = conv(inside, made, 1, groups=groups), nn.BatchNorm2d(made)

    def forward(self, x: Tensor) -> Tensor:
        out = shuffle(relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(relu(self.bn2(self.conv2(out)))))
        if self.stride == 1:
            return relu(out + x)
        return relu(torch.cat([out, avg_pool2d(x, 3, stride=2, padding=1)], dim=1))


class SplitBlock(nn.Module):
    """shuffle([a, relu(bn3(conv3(bn2(conv2(relu(bn1(conv1(b))))))))]), a and b the two halves of the channels."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = conv(half, half, 1), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = conv(half, half, 3, groups=half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        kept, out = x.chunk(2, dim=1)
        out = self.bn2(self.conv2(relu(self.bn1(self.conv1(out)))))
        return shuffle(torch.cat([kept, relu(self.bn3(self.conv3(out)))], dim=1), 2)


class DownBlock(nn.Module):
    """Halves the image: shuffle([conv1, conv2; conv3, conv4, conv5]), two branches that both see all channels."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = conv(channels, channels, 3, stride=2, groups=channels), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv(channels, half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv(channels, half, 1), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = conv(half, half, 3, stride=2, groups=half), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(relu(self.bn3(self.conv3(x)))))
        return shuffle(torch.cat([left, relu(self.bn5(self.conv5(right)))], dim=1), 2)


def shufflenet_v1(num_classes: int) -> nn.Sequential:
    """Stages of 4, 8 and 4 blocks, 240, 480 and 960 channels wide."""
    return named(
        conv1=conv(3, STEM, 1),
        bn1=nn.BatchNorm2d(STEM),
        relu=nn.ReLU(),
        layer1=stage(GroupedBlock, STEM, 240, 4, stride=2),
        layer2=stage(GroupedBlock, 240, 480, 8, stride=2),
        layer3=stage(GroupedBlock, 480, 960, 4, stride=2),
        pool=mean_over_the_image(),
        linear=nn.Linear(960, num_classes),
    )


def shufflenet_v2(num_classes: int) -> nn.Sequential:
    """Stages of 4, 8 and 4 blocks, 116, 232 and 464 channels wide, then 1024 channels."""
    return named(
        conv1=conv(3, STEM, 1),
        bn1=nn.BatchNorm2d(STEM),
        relu=nn.ReLU(),
        layer1=stage(_split_or_down, STEM, 116, 4, stride=2),
        layer2=stage(_split_or_down, 116, 232, 8, stride=2),
        layer3=stage(_split_or_down, 232, 464, 4, stride=2),
        conv2=conv(464, 1024, 1),
        bn2=nn.BatchNorm2d(1024),
        relu2=nn.ReLU(),
        pool=mean_over_the_image(),
        linear=nn.Linear(1024, num_classes),
    )


def _split_or_down(channels: int, width: int, stride: int) -> nn.Module:
    return SplitBlock(width) if stride == 1 else DownBlock(channels, width)
