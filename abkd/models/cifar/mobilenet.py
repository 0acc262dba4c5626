"""MobileNetV2 in the form of the CIFAR-100 distillation literature.

It differs from the paper's: half the width without rounding to multiples of 8, ReLU without the bound of 6, an
expanding convolution in the first block too, and strides for 32 x 32 images.

Source: Sandler et al., "MobileNetV2", CVPR 2018, Table 2; the CIFAR form as in Tian et al., "Contrastive
    representation distillation", ICLR 2020.
"""

from functools import partial

from torch import Tensor, nn

from abkd.models.cifar.layers import conv, he_normal, mean_over_the_image, named, small_linear, stage

STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""(expansion, channels at full width, blocks, stride)"""


class InvertedResidual(nn.Module):
    """x + conv(x): 1x1 to `expansion` times the channels, 3x3 on each, 1x1 back; without x where shapes differ."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int):
        super().__init__()
        inside = expansion * channels
        self.residual = stride == 1 and channels == width
        self.conv = nn.Sequential(
            *_conv_bn_relu(channels, inside, 1),
            *_conv_bn_relu(inside, inside, 3, stride, groups=inside),
            conv(inside, width, 1),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def mobilenet_v2(num_classes: int, *, width: float = 0.5) -> nn.Sequential:
    """Seven stages of inverted residuals, then 1280 channels.

    Args:
        width: of all but those 1280 channels, in parts of the paper's.
    """
    channels = stem = int(32 * width)
    blocks = []
    for expansion, full, depth, stride in STAGES:
        blocks.append(stage(partial(InvertedResidual, expansion=expansion), channels, int(full * width), depth, stride))
        channels = int(full * width)
    network = named(
        conv1=nn.Sequential(*_conv_bn_relu(3, stem, 3, stride=2)),
        blocks=nn.Sequential(*blocks),
        conv2=nn.Sequential(*_conv_bn_relu(channels, 1280, 1)),
        pool=mean_over_the_image(),
        classifier=nn.Sequential(small_linear(1280, num_classes)),
    )
    he_normal(network)
    return network


def _conv_bn_relu(channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [conv(channels, width, kernel, stride, groups), nn.BatchNorm2d(width), nn.ReLU()]
