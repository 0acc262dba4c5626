"""State dicts in whatever wrapping, put into networks whole or refused in one line."""

import collections

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from abkd.errors import InputError
from abkd.models.state_dicts import load_weights, read_state


def make(num_classes=3, width=4, layers=2):
    hidden = [nn.Linear(5, width), nn.BatchNorm1d(width), *(nn.Linear(width, width) for _ in range(layers - 1))]
    return nn.Sequential(*hidden, nn.Linear(width, num_classes))


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(network, other):
    return all(torch.equal(tensor, network.state_dict()[key]) for key, tensor in other.state_dict().items())


STATE = make().state_dict()
WRAPPINGS = {
    "bare": STATE,
    "a plain dict": dict(STATE),
    "state_dict": {"epoch": 3, "state_dict": STATE, "best_prec1": 91.7},
    "model": {"epoch": 240, "model": STATE, "accuracy": torch.tensor(71.2), "optimizer": {"lr": 0.1}},
    "model_state_dict": {"model_state_dict": STATE},
    "net": {"net": STATE, "acc": 95.1},
    "nested twice": {"model": {"state_dict": STATE}},
    "DataParallel": {"state_dict": collections.OrderedDict((f"module.{key}", value) for key, value in STATE.items())},
    "torch.compile in DistributedDataParallel": {f"module._orig_mod.{key}": value for key, value in STATE.items()},
    "of an ImageClassifier": {f"network.{key}": value for key, value in STATE.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_state_dict_is_found_in_its_wrapping(tmp_path, wrapping):
    torch.save(WRAPPINGS[wrapping], tmp_path / "w.pth")
    found = read_state(tmp_path / "w.pth", "teacher.path")
    assert list(found) == list(STATE) and all(torch.equal(found[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".th", ".pt", ".tar", ".bin"])
def test_files_of_torch_save_are_read(tmp_path, suffix, legacy):
    torch.save({"state_dict": STATE}, tmp_path / f"w{suffix}", _use_new_zipfile_serialization=not legacy)
    network = make()
    load_weights(network, tmp_path / f"w{suffix}", "net", "teacher")
    assert torch.equal(network[0].weight, STATE["0.weight"])


def test_a_safetensors_file_is_read(tmp_path):
    save_file({f"module.{key}": value for key, value in STATE.items()}, tmp_path / "w.safetensors")
    network = make()
    load_weights(network, tmp_path / "w.safetensors", "net", "teacher")
    assert torch.equal(network[0].weight, STATE["0.weight"])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 3, "optimizer": {"lr": 0.1}}, "epoch, optimizer"),
        ({}, "nothing"),
        ([1, 2], "list"),
        (torch.zeros(3), "Tensor"),
        ({0: torch.zeros(3)}, "0"),
        ({"state_dict": {}}, "state_dict"),
        ({"state_dict": {"weight": 3}}, "state_dict"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, content, found):
    torch.save(content, tmp_path / "w.pth")
    assert refusal(read_state, tmp_path / "w.pth", "teacher.path") == (
        f"teacher.path: {tmp_path / 'w.pth'} holds no state dict (but {found}); save model.state_dict()"
    )


@pytest.mark.parametrize("content", [make(), {"model": STATE, "accuracy": np.float64(71.2)}])
def test_a_file_with_objects_is_refused_and_not_run(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    assert refusal(read_state, tmp_path / "w.pth", "teacher.path") == (
        f"teacher.path: {tmp_path / 'w.pth'} holds objects, and reading them would run their code; where you trust it, "
        "save its weights alone: torch.save(model.state_dict(), ...)"
    )


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"PK\x03\x04", lambda _: b""])
def test_a_torn_file_is_refused(tmp_path, damage):
    torch.save(STATE, tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(damage((tmp_path / "w.pth").read_bytes()))
    line = refusal(read_state, tmp_path / "w.pth", "teacher.path")
    assert line.startswith(f"teacher.path: {tmp_path / 'w.pth'} cannot be read (") and line.endswith("; copy it again")


def saved(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "w.pth")
    return tmp_path / "w.pth"


def test_every_weight_is_put_in(tmp_path):
    network, other = make(), make()
    other[1].running_mean += 3
    assert not same(network, other)
    load_weights(network, saved(tmp_path, other), "net", "teacher")
    assert same(network, other)


def test_counters_of_batches_may_be_missing(tmp_path):
    state = {key: value for key, value in STATE.items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pth")
    network = make()
    load_weights(network, tmp_path / "w.pth", "net", "teacher")
    assert torch.equal(network[0].weight, STATE["0.weight"])


def test_half_precision_weights_become_the_networks(tmp_path):
    network = make()
    load_weights(network, saved(tmp_path, make().half()), "net", "teacher")
    assert network[0].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("other", "misfit"),
    [
        (make(layers=1), "2 missing (first 3.weight), 2 of another shape (first 2.weight [3, 4] for [4, 4])"),
        (make(layers=3), "2 unexpected (first 4.weight), 2 of another shape (first 3.weight [4, 4] for [3, 4])"),
        (make(width=6), "9 of another shape (first 0.weight [6, 5] for [4, 5])"),
        (
            nn.Sequential(nn.Conv2d(2, 2, 1)),
            "8 missing (first 1.weight), 2 of another shape (first 0.weight [2, 2, 1, 1] for [4, 5])",
        ),
        (nn.Linear(2, 2), "10 missing (first 0.weight), 2 unexpected (first weight)"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, other, misfit):
    file, network = saved(tmp_path, other), make()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert refusal(load_weights, network, file, "net", "teacher") == (
        f"teacher.path: {file} does not fit net: {misfit}; give the name of the network that it is of"
    )
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_network_without_a_linear_layer_has_no_head_to_exchange(tmp_path):
    network, file = nn.Sequential(nn.Conv2d(2, 3, 1)), saved(tmp_path, nn.Sequential(nn.Conv2d(2, 4, 1)))
    line = refusal(load_weights, network, file, "net", "teacher", new_head=True)
    assert "2 of another shape (first 0.weight [4, 2, 1, 1] for [3, 2, 1, 1])" in line


@pytest.mark.parametrize("num_classes", [3, 7])
def test_the_network_that_they_are_of_is_named(tmp_path, num_classes):
    file = saved(tmp_path, make(num_classes, layers=3))
    others = (("one", make(layers=1)), ("three", make(layers=3)), ("never", None))
    line = refusal(load_weights, make(), file, "net", "student", others=iter(others))
    assert line.endswith("; did you mean student.name=three?")


@pytest.mark.parametrize("there", [2, 9])
def test_other_classes_are_refused_or_get_a_new_head(tmp_path, there):
    file, network = saved(tmp_path, trained := make(there)), make(3)
    assert refusal(load_weights, network, file, "net", "teacher") == (
        f"teacher.path: {file} has {there} classes and 3 are wanted; give weights for those, or set "
        "teacher.new_head=true to train a head for them"
    )
    head = network[3].weight.clone()
    load_weights(network, file, "net", "teacher", new_head=True)
    assert torch.equal(network[3].weight, head) and torch.equal(network[2].weight, trained[2].weight)


def test_a_new_head_is_only_for_other_classes(tmp_path):
    network, trained = make(), make()
    load_weights(network, saved(tmp_path, trained), "net", "teacher", new_head=True)
    assert same(network, trained)
    line = refusal(load_weights, make(), saved(tmp_path, make(width=6)), "net", "teacher", new_head=True)
    assert "does not fit net" in line
