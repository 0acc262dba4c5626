"""What the families share: convolutions, stages, the end of a network, its first weights."""

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from abkd.errors import InputError


def conv(channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """`[batch, channels, h, w]` -> `[batch, width, ceil(h / stride), ceil(w / stride)]`, without a bias."""
    return nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def named(**parts: nn.Module) -> nn.Sequential:
    """The parts one after the other; their names are those of the state dict."""
    return nn.Sequential(OrderedDict(parts))


def stage(
    block: Callable[[int, int, int], nn.Module], channels: int, width: int, depth: int, stride: int = 1
) -> nn.Sequential:
    """`depth` blocks of `width` channels, of which the first takes `channels` and strides."""
    return nn.Sequential(block(channels, width, stride), *(block(width, width, 1) for _ in range(depth - 1)))


def projection(channels: int, width: int, stride: int) -> nn.Module:
    """A shortcut of He et al.'s option B: bn(conv 1x1) where the shape changes, else the identity."""
    if (channels, stride) == (width, 1):
        return nn.Identity()
    return nn.Sequential(conv(channels, width, 1, stride), nn.BatchNorm2d(width))


def mean_over_the_image() -> nn.Sequential:
    """`[batch, channels, h, w]` -> `[batch, channels]`."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def small_linear(channels: int, num_classes: int) -> nn.Linear:
    """First weights from N(0, 0.01^2), bias 0: every class starts at about 1 / num_classes."""
    head = nn.Linear(channels, num_classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


def blocks_in_a_stage(depth: int, others: int) -> int:
    """Of three alike stages of blocks of two convolutions; `others` are the layers outside of them."""
    if depth <= others or (depth - others) % 6:
        raise InputError(f"depth={depth}: must be 6 n + {others}, n the blocks in each of the three stages")
    return (depth - others) // 6


def he_normal(network: nn.Module) -> None:
    """Every convolution's weights from N(0, 2 / (kernel^2 * width)), its bias at 0.

    Source: He et al., "Delving deep into rectifiers", ICCV 2015, Eq. 14; grouped convolutions count as whole ones,
        as in the distillation literature.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
