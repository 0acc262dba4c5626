"""Networks of the CIFAR-100 distillation literature, for `[batch, 3, 32, 32]`. The table imports no torch.

Keys of the state dicts are those of the published weights: of RepDistiller and of what came from it, and for `_a` those
of akamaster/pytorch_resnet_cifar10. Each takes larger images too: the last step is a mean over the image.

Source: Tian et al., "Contrastive representation distillation", ICLR 2020, Tables 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

NARROW, FOUR_TIMES = (16, 16, 32, 64), (32, 64, 128, 256)


def _resnet(depth: int, widths: tuple[int, ...], num_classes: int) -> nn.Module:
    from abkd.models.cifar.resnet import resnet

    return resnet(depth, widths, num_classes)


def _resnet_a(depth: int, num_classes: int) -> nn.Module:
    from abkd.models.cifar.resnet import resnet_a

    return resnet_a(depth, num_classes)


def _resnet50(num_classes: int) -> nn.Module:
    from abkd.models.cifar.resnet import resnet50

    return resnet50(num_classes)


def _wide_resnet(depth: int, width: int, num_classes: int) -> nn.Module:
    from abkd.models.cifar.wide_resnet import wide_resnet

    return wide_resnet(depth, width, num_classes)


def _vgg(depths: tuple[int, ...], num_classes: int) -> nn.Module:
    from abkd.models.cifar.vgg import vgg

    return vgg(depths, num_classes)


def _mobilenet_v2(num_classes: int) -> nn.Module:
    from abkd.models.cifar.mobilenet import mobilenet_v2

    return mobilenet_v2(num_classes)


def _shufflenet_v1(num_classes: int) -> nn.Module:
    from abkd.models.cifar.shufflenet import shufflenet_v1

    return shufflenet_v1(num_classes)


def _shufflenet_v2(num_classes: int) -> nn.Module:
    from abkd.models.cifar.shufflenet import shufflenet_v2

    return shufflenet_v2(num_classes)


CIFAR_MODELS: dict[str, Callable[[int], nn.Module]] = {
    "resnet8": partial(_resnet, 8, NARROW),
    "resnet14": partial(_resnet, 14, NARROW),
    "resnet20": partial(_resnet, 20, NARROW),
    "resnet32": partial(_resnet, 32, NARROW),
    "resnet44": partial(_resnet, 44, NARROW),
    "resnet56": partial(_resnet, 56, NARROW),
    "resnet110": partial(_resnet, 110, NARROW),
    "resnet8x4": partial(_resnet, 8, FOUR_TIMES),
    "resnet32x4": partial(_resnet, 32, FOUR_TIMES),
    "resnet20_a": partial(_resnet_a, 20),
    "resnet32_a": partial(_resnet_a, 32),
    "resnet44_a": partial(_resnet_a, 44),
    "resnet56_a": partial(_resnet_a, 56),
    "resnet110_a": partial(_resnet_a, 110),
    "resnet50": _resnet50,
    "wrn_16_1": partial(_wide_resnet, 16, 1),
    "wrn_16_2": partial(_wide_resnet, 16, 2),
    "wrn_40_1": partial(_wide_resnet, 40, 1),
    "wrn_40_2": partial(_wide_resnet, 40, 2),
    "vgg8": partial(_vgg, (1, 1, 1, 1, 1)),
    "vgg11": partial(_vgg, (1, 1, 2, 2, 2)),
    "vgg13": partial(_vgg, (2, 2, 2, 2, 2)),
    "vgg16": partial(_vgg, (2, 2, 3, 3, 3)),
    "vgg19": partial(_vgg, (2, 2, 4, 4, 4)),
    "mobilenet_v2": _mobilenet_v2,
    "shufflenet_v1": _shufflenet_v1,
    "shufflenet_v2": _shufflenet_v2,
}
"""Name in recipes -> function of the number of classes. `_a`: shortcuts of He et al.'s option A, without weights."""
