"""The CIFAR networks: sizes and keys as published, and outputs equal to each network written as a formula."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from abkd.errors import InputError
from abkd.models.cifar import CIFAR_MODELS
from abkd.models.cifar.wide_resnet import wide_resnet

each_network = pytest.mark.parametrize("name", CIFAR_MODELS)


def size(name, num_classes=100):
    with torch.device("meta"):
        network = CIFAR_MODELS[name](num_classes)
    return sum(parameter.numel() for parameter in network.parameters())


def with_random_statistics(network):
    """In evaluation mode, no normalisation the identity, every parameter random."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.3)
    return network.double().eval()


# Sizes

MILLIONS = {
    "resnet20": 0.28, "resnet32": 0.47, "resnet44": 0.67, "resnet56": 0.86, "resnet110": 1.74, "resnet8x4": 1.23,
    "resnet32x4": 7.43, "resnet50": 23.71, "wrn_16_1": 0.18, "wrn_16_2": 0.70, "wrn_40_1": 0.57, "wrn_40_2": 2.26,
    "vgg8": 3.97, "vgg13": 9.46, "mobilenet_v2": 0.81, "shufflenet_v1": 0.95, "shufflenet_v2": 1.36,
}  # fmt: skip
"""As the distillation literature rounds them, 100 classes."""

EXACT = {
    ("resnet20_a", 10): 269_722, ("resnet32_a", 10): 464_154, ("resnet44_a", 10): 658_586,
    ("resnet56_a", 10): 853_018, ("resnet110_a", 10): 1_727_962, ("wrn_40_2", 100): 2_255_156,
    ("resnet50", 100): 23_705_252,
}  # fmt: skip
"""As printed by the original implementations."""


@pytest.mark.parametrize("name", MILLIONS)
def test_sizes_are_the_published_ones(name):
    assert round(size(name) / 1e6, 2) == MILLIONS[name]


@pytest.mark.parametrize(("name", "num_classes"), EXACT)
def test_sizes_that_were_published_exactly(name, num_classes):
    assert size(name, num_classes) == EXACT[name, num_classes]


def conv_bn(kernel, channels, width, groups=1):
    return kernel**2 * channels * width // groups + 2 * width


def counted_resnet(depth, widths, projected=True):
    n, total, channels = (depth - 2) // 6, conv_bn(3, 3, widths[0]), widths[0]
    for width in widths[1:]:
        total += conv_bn(3, channels, width) + (2 * n - 1) * conv_bn(3, width, width)
        total += conv_bn(1, channels, width) if projected and channels != width else 0
        channels = width
    return total + 101 * channels - channels + 100


def counted_wide_resnet(depth, k):
    n, total, channels = (depth - 4) // 6, 27 * 16, 16
    for width in (16 * k, 32 * k, 64 * k):
        total += 9 * channels * width + (2 * n - 1) * 9 * width**2 + (channels * width if channels != width else 0)
        total += 2 * channels + (2 * n - 1) * 2 * width
        channels = width
    return total + 2 * channels + 100 * channels + 100


def counted_vgg(convolutions):
    """`convolutions`: (channels, width) of each."""
    return sum(conv_bn(3, channels, width) + width for channels, width in convolutions) + 512 * 100 + 100


def counted_mobilenet():
    total, channels = conv_bn(3, 3, 16) + conv_bn(1, 160, 1280) + 1280 * 100 + 100, 16
    for expansion, width, depth in ((1, 8, 1), (6, 12, 2), (6, 16, 3), (6, 32, 4), (6, 48, 3), (6, 80, 3), (6, 160, 1)):
        for _ in range(depth):
            inside = expansion * channels
            total += conv_bn(1, channels, inside) + conv_bn(3, inside, inside, inside) + conv_bn(1, inside, width)
            channels = width
    return total


def counted_shufflenet_v1():
    total, channels = conv_bn(1, 3, 24) + 960 * 100 + 100, 24
    for width, depth in ((240, 4), (480, 8), (960, 4)):
        for made in [width - channels] + [width] * (depth - 1):
            inside = made // 4
            total += conv_bn(1, channels, inside, 1 if channels == 24 else 3)
            total += conv_bn(3, inside, inside, inside) + conv_bn(1, inside, made, 3)
            channels = width
    return total


def counted_shufflenet_v2():
    total, channels = conv_bn(1, 3, 24) + conv_bn(1, 464, 1024) + 1024 * 100 + 100, 24
    for half, repeats in ((58, 3), (116, 7), (232, 3)):
        total += conv_bn(3, channels, channels, channels) + 2 * conv_bn(1, channels, half)
        total += conv_bn(3, half, half, half) + conv_bn(1, half, half)
        total += repeats * (2 * conv_bn(1, half, half) + conv_bn(3, half, half, half))
        channels = 2 * half
    return total


COUNTED = {f"resnet{depth}": counted_resnet(depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)}
COUNTED |= {f"resnet{d}_a": counted_resnet(d, (16, 16, 32, 64), projected=False) for d in (20, 32, 44, 56, 110)}
COUNTED |= {f"resnet{depth}x4": counted_resnet(depth, (32, 64, 128, 256)) for depth in (8, 32)}
COUNTED |= {f"wrn_{depth}_{k}": counted_wide_resnet(depth, k) for depth in (16, 40) for k in (1, 2)}
COUNTED |= {
    "vgg8": counted_vgg([(3, 64), (64, 128), (128, 256), (256, 512), (512, 512)]),
    "vgg19": counted_vgg(
        [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), *[(256, 256)] * 3, (256, 512), *[(512, 512)] * 7]
    ),
    "mobilenet_v2": counted_mobilenet(),
    "shufflenet_v1": counted_shufflenet_v1(),
    "shufflenet_v2": counted_shufflenet_v2(),
}


@pytest.mark.parametrize("name", COUNTED)
def test_sizes_follow_from_the_papers_tables(name):
    assert size(name) == COUNTED[name]


def test_vgg_has_as_many_layers_as_its_name_says():
    for depth in (8, 11, 13, 16, 19):
        with torch.device("meta"):
            convolutions = sum(isinstance(m, nn.Conv2d) for m in CIFAR_MODELS[f"vgg{depth}"](10).modules())
        assert convolutions == {8: 5, 11: 8, 13: 10, 16: 13, 19: 16}[depth]  # and 1 linear layer where VGG has 3


# Keys of published weights

TRACKED = "num_batches_tracked"
KEYS = {
    "resnet20": (107, ["bn1.running_mean", "layer1.2.conv2.weight", "layer2.0.bn1.bias",
                           "layer2.0.downsample.0.weight", "layer3.0.downsample.1.bias", "fc.weight", "fc.bias"]),
    "resnet8x4": (52, ["layer1.0.downsample.0.weight", "layer3.0.downsample.1.weight", "fc.bias"]),
    "resnet20_a": (97, ["conv1.weight", "layer1.0.conv1.weight", "layer3.2.bn2.running_var", "linear.weight"]),
    "resnet56_a": (277, ["layer3.8.bn2.running_mean", "linear.bias"]),
    "resnet50": (267, ["layer1.0.shortcut.0.weight", "layer1.0.shortcut.1.bias", "layer4.2.conv3.weight",
                       "layer3.5.bn3.weight", "linear.weight"]),
    "wrn_16_2": (70, ["block1.layer.0.bn1.weight", "block1.layer.0.convShortcut.weight", "block3.layer.1.conv2.weight",
                      "bn1.weight", "fc.weight"]),
    "vgg8": (32, ["block0.0.weight", "block0.0.bias", "block0.1.running_mean", "block4.1.weight",
                      "classifier.weight"]),
    "vgg13": (62, ["block0.3.weight", "block4.4.running_var", "classifier.bias"]),
    "mobilenet_v2": (267, ["conv1.0.weight", "conv1.1.bias", "blocks.0.0.conv.0.weight", "blocks.2.1.conv.3.weight",
                           "blocks.6.0.conv.7.running_mean", "conv2.1.weight", "classifier.0.weight"]),
    "shufflenet_v1": (247, ["conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer2.7.bn3.bias",
                            "linear.weight"]),
    "shufflenet_v2": (282, ["layer1.0.conv5.weight", "layer1.0.bn5.bias", "layer2.7.conv3.weight", "conv2.weight",
                            "bn2.running_var", "linear.bias"]),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_keys_are_those_of_the_published_weights(name):
    count, keys = KEYS[name]
    with torch.device("meta"):
        state = CIFAR_MODELS[name](100).state_dict()
    assert set(keys) <= set(state)
    assert sum(not key.endswith(TRACKED) for key in state) == count


def test_no_two_networks_take_the_same_weights():
    layouts = set()
    for build in CIFAR_MODELS.values():
        with torch.device("meta"):
            layouts.add(tuple((key, tuple(tensor.shape)) for key, tensor in build(10).state_dict().items()))
    assert len(layouts) == len(CIFAR_MODELS)


# Shapes and gradients


@each_network
def test_every_parameter_learns_from_logits_of_any_number_of_classes(name):
    network = CIFAR_MODELS[name](7)
    logits = network(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 7) and logits.dtype == torch.float32
    F.cross_entropy(logits, torch.tensor([0, 6])).backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in network.parameters())


FAMILIES = ["resnet20", "resnet20_a", "wrn_16_1", "vgg8", "mobilenet_v2", "shufflenet_v1", "shufflenet_v2"]


@pytest.mark.parametrize("name", FAMILIES)
def test_one_image_is_classified_as_it_is_in_a_batch(name):
    network = CIFAR_MODELS[name](3).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(images[:1]), network(images)[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_of_another_size_are_taken(name):
    assert CIFAR_MODELS[name](5).eval()(torch.rand(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize("name", ["resnet32x4", "wrn_40_2", "vgg13", "mobilenet_v2"])
def test_first_weights_keep_the_variance(name):
    network = CIFAR_MODELS[name](10)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 20_000:
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.03)
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("depth", [-2, 4, 17])
def test_a_depth_that_makes_no_even_stages_is_refused(depth):
    with pytest.raises(InputError) as caught:
        wide_resnet(depth, 1, 10)
    assert str(caught.value) == f"depth={depth}: must be 6 n + 4, n the blocks in each of the three stages"


def test_the_table_needs_no_torch():
    code = "import sys, abkd.models.cifar as c; assert len(c.CIFAR_MODELS) == 27 and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Each family once more, as a formula of its state dict


class Formula:
    """Layers by their keys."""

    def __init__(self, state):
        self.state = state

    def conv(self, x, key, stride=1, groups=1):
        weight = self.state[f"{key}.weight"]
        bias = self.state.get(f"{key}.bias")
        return F.conv2d(x, weight, bias, stride, padding=weight.shape[-1] // 2, groups=groups)

    def bn(self, x, key):
        mean, var, weight, bias = (
            self.state[f"{key}.{leaf}"][:, None, None] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv_bn(self, x, conv, bn, stride=1, groups=1):
        return self.bn(self.conv(x, conv, stride, groups), bn)

    def head(self, x, key):
        return x.mean(dim=(2, 3)) @ self.state[f"{key}.weight"].T + self.state[f"{key}.bias"]


def resnet20_a(f, x):
    x = f.conv_bn(x, "conv1", "bn1").clamp(min=0)
    for stage in (1, 2, 3):
        for block in (0, 1, 2):
            here, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            out = f.conv_bn(x, f"{here}.conv1", f"{here}.bn1", stride).clamp(min=0)
            out = f.conv_bn(out, f"{here}.conv2", f"{here}.bn2")
            if stride == 2:
                wider = torch.zeros_like(out)
                quarter = out.shape[1] // 4
                wider[:, quarter : 3 * quarter] = x[:, :, 0::2, 0::2]
                x = wider
            x = (out + x).clamp(min=0)
    return f.head(x, "linear")


def resnet8x4(f, x):
    x = f.conv_bn(x, "conv1", "bn1").clamp(min=0)
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        here = f"layer{stage}.0"
        out = f.conv_bn(x, f"{here}.conv1", f"{here}.bn1", stride).clamp(min=0)
        out = f.conv_bn(out, f"{here}.conv2", f"{here}.bn2")
        x = (out + f.conv_bn(x, f"{here}.downsample.0", f"{here}.downsample.1", stride)).clamp(min=0)
    return f.head(x, "fc")


def resnet50(f, x):
    x = f.conv_bn(x, "conv1", "bn1").clamp(min=0)
    for stage, depth in ((1, 3), (2, 4), (3, 6), (4, 3)):
        for block in range(depth):
            here, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            out = f.conv_bn(x, f"{here}.conv1", f"{here}.bn1").clamp(min=0)
            out = f.conv_bn(out, f"{here}.conv2", f"{here}.bn2", stride).clamp(min=0)
            out = f.conv_bn(out, f"{here}.conv3", f"{here}.bn3")
            if block == 0:
                x = f.conv_bn(x, f"{here}.shortcut.0", f"{here}.shortcut.1", stride)
            x = (out + x).clamp(min=0)
    return f.head(x, "linear")


def wrn_16_2(f, x):
    x = f.conv(x, "conv1")
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        here = f"block{stage}.layer"
        y = f.bn(x, f"{here}.0.bn1").clamp(min=0)
        out = f.conv(y, f"{here}.0.conv1", stride)
        out = f.conv(f.bn(out, f"{here}.0.bn2").clamp(min=0), f"{here}.0.conv2")
        x = out + f.conv(y, f"{here}.0.convShortcut", stride)
        out = f.conv(f.bn(x, f"{here}.1.bn1").clamp(min=0), f"{here}.1.conv1")
        x = x + f.conv(f.bn(out, f"{here}.1.bn2").clamp(min=0), f"{here}.1.conv2")
    return f.head(f.bn(x, "bn1").clamp(min=0), "fc")


def vgg11(f, x):
    for key, pooled in (("0", True), ("1", True), ("2", True), ("3", False), ("4", False)):
        x = f.conv_bn(x, f"block{key}.0", f"block{key}.1").clamp(min=0)
        if key in "234":
            x = f.conv_bn(x, f"block{key}.3", f"block{key}.4").clamp(min=0)
        if pooled:
            x = torch.stack([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(0)
    return f.head(x, "classifier")


def mobilenet_v2(f, x):
    x = f.conv_bn(x, "conv1.0", "conv1.1", 2).clamp(min=0)
    for stage, (depth, first_stride) in enumerate(((1, 1), (2, 1), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1))):
        for block in range(depth):
            here, stride = f"blocks.{stage}.{block}.conv", first_stride if block == 0 else 1
            out = f.conv_bn(x, f"{here}.0", f"{here}.1").clamp(min=0)
            out = f.conv_bn(out, f"{here}.3", f"{here}.4", stride, groups=out.shape[1]).clamp(min=0)
            out = f.conv_bn(out, f"{here}.6", f"{here}.7")
            x = x + out if block > 0 else out
    return f.head(f.conv_bn(x, "conv2.0", "conv2.1").clamp(min=0), "classifier.0")


def interleaved(x, groups):
    parts = x.split(x.shape[1] // groups, dim=1)
    return torch.stack([part[:, i] for i in range(parts[0].shape[1]) for part in parts], dim=1)


def shufflenet_v1(f, x):
    x = f.conv_bn(x, "conv1", "bn1").clamp(min=0)
    for stage, depth in ((1, 4), (2, 8), (3, 4)):
        for block in range(depth):
            here, groups, stride = f"layer{stage}.{block}", 1 if (stage, block) == (1, 0) else 3, 2 - (block > 0)
            out = f.conv_bn(x, f"{here}.conv1", f"{here}.bn1", groups=groups).clamp(min=0)
            out = interleaved(out, groups)
            out = f.conv_bn(out, f"{here}.conv2", f"{here}.bn2", stride, groups=out.shape[1]).clamp(min=0)
            out = f.conv_bn(out, f"{here}.conv3", f"{here}.bn3", groups=3)
            if block == 0:
                ones = torch.ones(x.shape[1], 1, 3, 3, dtype=x.dtype)
                out = torch.cat([out, F.conv2d(x, ones / 9, stride=2, padding=1, groups=x.shape[1])], dim=1)
            else:
                out = out + x
            x = out.clamp(min=0)
    return f.head(x, "linear")


def shufflenet_v2(f, x):
    x = f.conv_bn(x, "conv1", "bn1").clamp(min=0)
    for stage, repeats in ((1, 3), (2, 7), (3, 3)):
        here, channels = f"layer{stage}.0", x.shape[1]
        left = f.conv_bn(x, f"{here}.conv1", f"{here}.bn1", 2, groups=channels)
        left = f.conv_bn(left, f"{here}.conv2", f"{here}.bn2").clamp(min=0)
        right = f.conv_bn(x, f"{here}.conv3", f"{here}.bn3").clamp(min=0)
        right = f.conv_bn(right, f"{here}.conv4", f"{here}.bn4", 2, groups=right.shape[1])
        right = f.conv_bn(right, f"{here}.conv5", f"{here}.bn5").clamp(min=0)
        x = interleaved(torch.cat([left, right], dim=1), 2)
        for block in range(1, repeats + 1):
            here, half = f"layer{stage}.{block}", x.shape[1] // 2
            out = f.conv_bn(x[:, half:], f"{here}.conv1", f"{here}.bn1").clamp(min=0)
            out = f.conv_bn(out, f"{here}.conv2", f"{here}.bn2", groups=half)
            out = f.conv_bn(out, f"{here}.conv3", f"{here}.bn3").clamp(min=0)
            x = interleaved(torch.cat([x[:, :half], out], dim=1), 2)
    return f.head(f.conv_bn(x, "conv2", "bn2").clamp(min=0), "linear")


FORMULAS = [resnet20_a, resnet8x4, resnet50, wrn_16_2, vgg11, mobilenet_v2, shufflenet_v1, shufflenet_v2]


@pytest.mark.parametrize("formula", FORMULAS, ids=[formula.__name__ for formula in FORMULAS])
def test_outputs_are_those_of_the_formula(formula):
    network = with_random_statistics(CIFAR_MODELS[formula.__name__](5))
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        found, expected = network(images), formula(Formula(network.state_dict()), images)
    assert expected.std() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
