import pytest
import torch
from torch import nn

from abkd.errors import InputError
from abkd.features import FeatureHook


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(inplace=True))
        self.tokens = nn.Conv1d(5, 4, 1)
        self.hidden = nn.Linear(36 * 4, 6)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 2)
        self.unused = nn.Linear(2, 2)

    def forward(self, images):
        return self.head(self.act(self.hidden(self.tokens(self.stem(images).flatten(2)).flatten(1))))


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)


IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


def test_features_are_what_the_layers_give_and_receive():
    net = Net()
    maps = net.stem(IMAGES)
    tokens = net.tokens(maps.flatten(2))
    hidden = net.hidden(tokens.flatten(1))
    convolved = net.stem[0](IMAGES)
    for layer, side, expected in (
        ("stem", "output", maps.mean((2, 3))),
        ("stem.0", "input", IMAGES.mean((2, 3))),
        ("stem.0", "output", convolved.mean((2, 3))),  # before the ReLU that works in place
        ("tokens", "output", tokens.flatten(1)),
        ("hidden", "output", hidden),
        ("head", "input", hidden.relu()),
    ):
        with FeatureHook(net, layer, side) as hook:
            net(IMAGES)
            torch.testing.assert_close(hook.take(), expected, rtol=0, atol=1e-7)


def test_a_feature_is_attached_to_the_graph_and_serves_once():
    net = Net()
    with FeatureHook(net, "head", "input") as hook:
        net(IMAGES)
        hook.take().sum().backward()
        assert net.hidden.weight.grad.abs().sum() > 0 and net.head.weight.grad is None
        with pytest.raises(InputError, match="layer: no forward pass has been through 'head'"):
            hook.take()


def test_a_closed_hook_leaves_the_model_as_it_was():
    net = Net()
    before, keys = net(IMAGES), list(net.state_dict())
    hooks = [FeatureHook(net, "stem"), FeatureHook(net, "head", "input")]
    during = net(IMAGES)
    for hook in hooks:
        hook.close()
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in net.modules())
    assert torch.equal(before, during) and torch.equal(before, net(IMAGES)) and list(net.state_dict()) == keys


@pytest.mark.parametrize(
    "wrap", [Wrapper, lambda net: Wrapper(Wrapper(net)), lambda net: torch.compile(net, backend="eager")]
)
def test_names_are_those_inside_the_wrappers(wrap):
    net = Net()
    wrapped = wrap(net)
    with FeatureHook(wrapped, "head", "input") as hook:
        wrapped(IMAGES)
        feature = hook.take()
    assert torch.equal(feature, net.hidden(net.tokens(net.stem(IMAGES).flatten(2)).flatten(1)).relu())


@pytest.mark.parametrize(
    "output, expected",
    [
        (lambda x: (x, None), "x"),
        (lambda x: {"pooled": x, "all": None}, "x"),
        (lambda x: [(x, 1)], "x"),
        (lambda x: x.sum(), r"the output of 'inner' must be \[batch, ...\], got shape \(\)"),
        (lambda x: x[:, 0], r"got shape \(2,\)"),
        (lambda x: "text", "got str"),
        (lambda x: (), "got tuple"),
    ],
)
def test_of_several_outputs_the_first_counts(output, expected):
    class Inner(nn.Module):
        def forward(self, x, *, scale):
            return output(x)

    net = nn.Module()
    net.inner = Inner()
    x = torch.randn(2, 3)
    hook = FeatureHook(net, "inner")
    if expected == "x":
        net.inner(x, scale=1)
        assert torch.equal(hook.take(), x)
        with FeatureHook(net, "inner", "input") as received:
            net.inner(x=x, scale=2)
            assert torch.equal(received.take(), x)
    else:
        with pytest.raises(InputError, match=expected):
            net.inner(x, scale=1)


@pytest.mark.parametrize(
    "layer, side, message",
    [
        ("stem.conv", "output", r"layer: Net has no layer 'stem.conv'; near it are stem"),
        ("haed", "output", "near it are head"),
        ("zzz", "output", "near it are .*unused"),
        ("", "output", "Net has no layer ''"),
        ("head", "inputs", "side must be input or output, got 'inputs'"),
    ],
)
def test_an_unknown_layer_is_refused(layer, side, message):
    with pytest.raises(InputError, match=message):
        FeatureHook(Net(), layer, side)


def test_a_layer_that_is_never_called_is_found():
    net = Net()
    with FeatureHook(net, "unused") as hook:
        net(IMAGES)
        with pytest.raises(InputError, match="no forward pass has been through 'unused'"):
            hook.take()
