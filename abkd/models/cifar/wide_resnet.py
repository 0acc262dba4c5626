"""Wide residual networks, WRN-depth-width, without dropout.

Source: Zagoruyko and Komodakis, "Wide residual networks", BMVC 2016, Table 1.
"""

from torch import Tensor, nn
from torch.nn.functional import relu

from abkd.models.cifar.layers import blocks_in_a_stage, conv, he_normal, mean_over_the_image, named, stage


class PreactivationBlock(nn.Module):
    """conv2(relu(bn2(conv1(y)))) + x, y = relu(bn1(x)); where the width changes, + convShortcut(y) instead of x."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3)
        self.convShortcut = None if channels == width else conv(channels, width, 1, stride)  # the published key

    def forward(self, x: Tensor) -> Tensor:
        active = relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return self.conv2(relu(self.bn2(self.conv1(active)))) + shortcut


def wide_resnet(depth: int, width: int, num_classes: int) -> nn.Sequential:
    """Three stages of (depth - 4) / 6 blocks, 16, 32 and 64 times `width` channels wide."""
    num_blocks = blocks_in_a_stage(depth, 4)
    first, second, third = 16 * width, 32 * width, 64 * width
    network = named(
        conv1=conv(3, 16, 3),
        block1=named(layer=stage(PreactivationBlock, 16, first, num_blocks)),
        block2=named(layer=stage(PreactivationBlock, first, second, num_blocks, stride=2)),
        block3=named(layer=stage(PreactivationBlock, second, third, num_blocks, stride=2)),
        bn1=nn.BatchNorm2d(third),
        relu=nn.ReLU(),
        pool=mean_over_the_image(),
        fc=nn.Linear(third, num_classes),
    )
    he_normal(network)
    return network
