"""Image classifiers found or refused at once, loaded with whatever their files say, saved and loaded back."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from abkd.errors import InputError
from abkd.models.cifar import CIFAR_MODELS
from abkd.models.classifier_spec import ClassifierSpec
from abkd.models.classifiers import find_classifier, load_classifier, save_classifier

MEAN, STD = (0.5, 0.25, 0.125), (0.2, 0.5, 2.0)
NEW = {"kind": "cifar", "name": "resnet8", "num_classes": 3, "mean": MEAN, "std": STD}


def refusal(function=load_classifier, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(first, second):
    states = first.state_dict(), second.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


@pytest.fixture
def folder(tmp_path):
    save_classifier(load_classifier(**NEW, size=40, classes=["a", "b", "c"]), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def file(tmp_path):
    torch.save({"model": CIFAR_MODELS["resnet8"](3).state_dict()}, tmp_path / "resnet8.pth")
    return tmp_path / "resnet8.pth"


# New weights


def test_new_weights_come_from_the_seed_and_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (load_classifier(**NEW, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert same(first, again) and not same(first, other)
    assert not first.training
    assert first.spec == ClassifierSpec("cifar", "resnet8", 3, MEAN, STD)


def test_the_networks_images_are_normalised():
    classifier, images = load_classifier(**NEW), torch.rand(2, 3, 32, 32)
    by_hand = torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    torch.testing.assert_close(classifier(images), classifier.network(by_hand))


# Files of weights


def test_a_published_file_is_loaded(file):
    classifier = load_classifier(**NEW, path=str(file))
    published = torch.load(file, weights_only=True)["model"]
    assert all(torch.equal(published[key], value) for key, value in classifier.network.state_dict().items())


def test_a_path_of_an_installed_package_is_found(file, tmp_path, monkeypatch):
    (tmp_path / "weights_of_tests").mkdir()
    (tmp_path / "weights_of_tests" / "__init__.py").touch()
    file.rename(tmp_path / "weights_of_tests" / "w.pth")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_classifier(**NEW, path="package:weights_of_tests/w.pth").num_classes == 3


@pytest.mark.parametrize("name", ["resnet8x4", "resnet20_a"])
def test_weights_of_another_network_of_the_table_name_it(tmp_path, name):
    torch.save(CIFAR_MODELS[name](10).state_dict(), tmp_path / "w.pth")
    line = refusal(**NEW | {"name": "resnet14"}, path=str(tmp_path / "w.pth"), section="teacher")
    assert line.startswith(f"teacher.path: {tmp_path / 'w.pth'} does not fit resnet14: ")
    assert line.endswith(f"; did you mean teacher.name={name}?")
    assert torch.zeros(1).device.type == "cpu"  # the search leaves nothing behind


def test_other_classes_are_refused_or_get_a_new_head(file):
    line = refusal(**NEW | {"num_classes": 5}, path=str(file), section="teacher")
    assert line == (
        f"teacher.path: {file} has 3 classes and 5 are wanted; give weights for those, or set "
        "teacher.new_head=true to train a head for them"
    )
    heads = [load_classifier(**NEW | {"num_classes": 5}, path=str(file), new_head=True, seed=s) for s in (0, 0, 1)]
    assert heads[0](torch.rand(1, 3, 32, 32)).shape == (1, 5)
    assert same(heads[0], heads[1]) and not same(heads[0], heads[2])
    assert torch.equal(heads[0].network.conv1.weight, heads[2].network.conv1.weight)


@pytest.mark.parametrize("key", ["num_classes", "mean", "std"])
def test_what_no_file_says_must_be_given(file, key):
    line = refusal(**{k: v for k, v in NEW.items() if k != key}, path=str(file), section="teacher")
    assert line.startswith(f"teacher.{key} is missing, and no file says it; give ")


def test_values_out_of_range_name_their_field():
    assert refusal(**NEW | {"std": (1, 1, 0)}, section="student").startswith("student.std=(1.0, 1.0, 0.0): ")


# Saved folders


def test_a_saved_classifier_comes_back_bit_for_bit(folder):
    torch.manual_seed(1)
    made = load_classifier(**NEW, size=40, classes=["a", "b", "c"])
    loaded = load_classifier(kind="cifar", path=str(folder))
    assert same(loaded, made) and loaded.spec == made.spec
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), made(images))


def test_statistics_and_layouts_survive_saving(tmp_path):
    classifier = load_classifier(**NEW).train().to(memory_format=torch.channels_last)
    classifier(torch.rand(4, 3, 32, 32))
    save_classifier(classifier, tmp_path / "new" / "saved")
    loaded = load_classifier(kind="cifar", path=str(tmp_path / "new" / "saved"))
    assert same(loaded, classifier) and loaded.network.bn1.running_mean.any()
    assert loaded.network.bn1.num_batches_tracked == 1


def test_a_saved_folder_is_plain(folder):
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text(encoding="utf-8")) == {
        "kind": "cifar", "name": "resnet8", "num_classes": 3, "mean": list(MEAN), "std": list(STD), "size": 40,
        "classes": ["a", "b", "c"],
    }  # fmt: skip
    assert load_file(folder / "model.safetensors").keys() == CIFAR_MODELS["resnet8"](3).state_dict().keys()


def test_what_is_given_counts_before_what_the_folder_says(folder):
    loaded = load_classifier(kind="cifar", name="resnet8", path=str(folder), mean=(0, 0, 0), size=32)
    assert loaded.spec == ClassifierSpec("cifar", "resnet8", 3, (0.0,) * 3, STD, 32, ("a", "b", "c"))
    assert load_classifier(kind="cifar", path=str(folder), num_classes=4, new_head=True).classes is None


def test_a_folder_of_another_network_is_refused(folder):
    line = refusal(kind="cifar", name="resnet14", path=str(folder), section="teacher")
    assert line == f"teacher.name=resnet14: {str(folder)!r} holds resnet8; leave the name out"


# Finding


def find(**options):
    return refusal(find_classifier, section="teacher", **options)


def test_finding_needs_no_torch(folder, file):
    code = f"""
import sys
from abkd.models.classifiers import find_classifier
assert find_classifier(kind="cifar", path={str(folder)!r})["mean"] == [0.5, 0.25, 0.125]
assert find_classifier(kind="cifar", name="resnet8", path={str(file)!r}) == {{"name": "resnet8"}}
assert not {{"torch", "transformers", "safetensors"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("ResNet-56", "did you mean resnet56, resnet56_a, resnet50?"),
        ("wrn-40-2", "did you mean wrn_40_2"),
        ("ShuffleV1", "did you mean shufflenet_v1"),
        ("MobileNetV2", "did you mean mobilenet_v2"),
        ("vgg12", "did you mean vgg"),
        ("transformer", f"there are {', '.join(CIFAR_MODELS)}"),
    ],
)
def test_a_wrong_name_names_the_nearest(name, hint):
    assert find(kind="cifar", name=name).startswith(f"teacher.name={name}: there is no such network; {hint}")


def test_a_name_is_needed(file):
    for options in ({}, {"path": str(file)}):
        assert find(kind="cifar", **options) == "teacher.name is missing; give the network's name, as in resnet20"


def test_a_wrong_kind_is_refused():
    assert find(kind="cifer", name="resnet8") == "teacher.kind=cifer: must be one of cifar, pretrained, timm"


def test_a_wrong_path_names_the_nearest(file):
    near, far = str(file.with_name("resnet8.pt")), str(file.parent / "a" / "b.pth")
    assert find(kind="cifar", name="resnet8", path=near) == (
        f"teacher.path: there is no file {near!r}; did you mean resnet8.pth?"
    )
    assert find(kind="cifar", name="resnet8", path=far) == (
        f"teacher.path: there is no file {far!r}; give a file of weights or the folder of a saved classifier"
    )


DAMAGES = {
    "an HTML page": (
        b"<!DOCTYPE html>",
        "is no file of torch.save or safetensors; give a file that holds a state dict",
    ),
    "empty": (b"", "is no file of torch.save or safetensors; give a file that holds a state dict"),
    "half of it": (None, "is torn; copy it again"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_file_is_refused_before_torch_is_loaded(file, damage):
    content, reason = DAMAGES[damage]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert find(kind="cifar", name="resnet8", path=str(file)) == f"teacher.path: {file} {reason}"


def test_torn_safetensors_are_refused(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    expected = f"teacher.path: {weights} is torn: {len(whole) - 1:,} bytes of {len(whole):,}; copy it again"
    assert find(kind="cifar", path=str(folder)) == expected
    assert find(kind="cifar", name="resnet8", path=str(weights)) == expected
    weights.unlink()
    assert find(kind="cifar", path=str(folder)) == (
        f"teacher.path: {str(folder)!r} holds no model.safetensors; copy the folder again"
    )


@pytest.mark.parametrize(
    ("config", "way_out"),
    [
        ({"kind": "timm", "name": "resnet18"}, "set teacher.kind=timm"),
        ({"model_type": "vit"}, "set teacher.kind=pretrained"),
        ({}, "give the folder of a saved classifier"),
    ],
)
def test_a_folder_of_another_kind_is_refused(folder, config, way_out):
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert find(kind="cifar", path=str(folder)) == (
        f"teacher.kind=cifar: {str(folder)!r} holds no classifier of this kind; {way_out}"
    )


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    assert find(kind="cifar", path=str(tmp_path)) == (
        f"teacher.path: {str(tmp_path)!r} holds no config.json; give the folder of a saved classifier"
    )


def test_a_configuration_changed_by_hand_is_checked(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for change in ({"name": 5}, {"classes": 7}, {"mean": "grey"}, {"num_classes": "3"}):
        (folder / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
        assert refusal(kind="cifar", path=str(folder), section="teacher").startswith(f"teacher.{next(iter(change))}")


def test_weights_for_the_whole_classifier_are_taken(tmp_path):
    """Keys of `ImageClassifier.state_dict()` begin with network."""
    classifier = load_classifier(**NEW, seed=4)
    save_file(classifier.state_dict(), tmp_path / "model.safetensors")
    assert same(load_classifier(**NEW, path=str(tmp_path / "model.safetensors")), classifier)


def test_only_timm_downloads():
    assert refusal(**NEW, pretrained=True, section="teacher") == (
        "teacher.pretrained=true: is for kind=timm without a path; leave it out"
    )
