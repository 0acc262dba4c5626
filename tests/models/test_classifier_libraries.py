"""Networks of transformers, from folders; of timm, by a stand-in for that package."""

import importlib.machinery
import json
import sys
import types

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from abkd.errors import InputError
from abkd.models.classifier_spec import ClassifierSpec
from abkd.models.classifiers import find_classifier, load_classifier, save_classifier

MEAN, STD = (0.5, 0.25, 0.125), (0.2, 0.5, 2.0)


def make_vit(num_labels=3, **options):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=num_labels, **options,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def make_resnet(num_labels=3):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=num_labels)
    return ResNetForImageClassification(config).eval()


def refusal(function=load_classifier, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(**{"section": "teacher"} | options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(first, second):
    states = first.state_dict(), second.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


@pytest.fixture
def folder(tmp_path):
    """A ViT for three named classes of 8 x 8 images."""
    names = {0: "cat", 1: "dog", 2: "hen"}
    model = make_vit(id2label=names, label2id={name: index for index, name in names.items()})
    model.save_pretrained(tmp_path / "vit")
    said = {"image_mean": MEAN, "image_std": STD, "size": {"height": 8, "width": 8}, "do_resize": True}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(said), encoding="utf-8")
    return tmp_path / "vit"


# transformers


def test_a_folder_says_everything(folder):
    classifier = load_classifier(kind="pretrained", path=str(folder))
    assert classifier.spec == ClassifierSpec("pretrained", "vit", 3, MEAN, STD, 8, ("cat", "dog", "hen"))
    images = torch.rand(2, 3, 8, 8)
    by_hand = torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    torch.testing.assert_close(classifier(images), model(by_hand).logits)
    assert classifier(torch.rand(1, 3, 32, 20)).shape == (1, 3)


@pytest.mark.parametrize("make", [make_vit, make_resnet])
def test_a_saved_classifier_comes_back_bit_for_bit(tmp_path, make):
    make().save_pretrained(tmp_path / "origin")
    given = {"mean": (1 / 3, 0.1, 2 / 7), "std": STD, "size": 8, "classes": ["é", "b", "c"]}
    classifier = load_classifier(kind="pretrained", path=str(tmp_path / "origin"), **given)
    save_classifier(classifier, tmp_path / "saved")
    loaded = load_classifier(kind="pretrained", path=str(tmp_path / "saved"))
    assert same(loaded, classifier) and loaded.spec == classifier.spec
    images = torch.rand(2, 3, 9, 9)
    assert torch.equal(loaded(images), classifier(images))
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert theirs.config.id2label == {0: "é", 1: "b", 2: "c"} and theirs.config.label2id["c"] == 2


def test_weights_in_half_precision_become_fp32(tmp_path):
    make_vit().to(torch.bfloat16).save_pretrained(tmp_path / "vit")
    classifier = load_classifier(kind="pretrained", path=str(tmp_path / "vit"), mean=MEAN, std=STD)
    assert {parameter.dtype for parameter in classifier.parameters()} == {torch.float32}


def test_what_is_given_counts_before_what_the_folder_says(folder):
    spec = load_classifier(kind="pretrained", path=str(folder), num_classes=3, std=(1, 1, 1), size=8).spec
    assert spec == ClassifierSpec("pretrained", "vit", 3, MEAN, (1.0,) * 3, 8, ("cat", "dog", "hen"))


@pytest.mark.parametrize("num_labels", [2, 3])
def test_names_that_say_nothing_are_none(tmp_path, num_labels):
    make_vit(num_labels).save_pretrained(tmp_path / "vit")
    classifier = load_classifier(kind="pretrained", path=str(tmp_path / "vit"), mean=MEAN, std=STD)
    assert (classifier.classes, classifier.num_classes, classifier.size) == (None, num_labels, None)


def test_a_folder_without_a_normalisation_needs_one(tmp_path):
    make_vit().save_pretrained(tmp_path / "vit")
    line = refusal(kind="pretrained", path=str(tmp_path / "vit"))
    assert line.startswith("teacher.mean is missing, and no file says it; give ")


def test_other_classes_are_refused_or_get_a_new_head(folder):
    asked = {"kind": "pretrained", "path": str(folder), "num_classes": 5}
    assert refusal(**asked) == (
        f"teacher.path: {str(folder)!r} has 3 classes and 5 are wanted; give weights for those, or set "
        "teacher.new_head=true to train a head for them"
    )
    first, again, other = (load_classifier(**asked, new_head=True, seed=seed) for seed in (0, 0, 1))
    assert first(torch.rand(2, 3, 8, 8)).shape == (2, 5) and first.spec.classes is None
    assert same(first, again)
    heads = {key for key, value in first.state_dict().items() if not torch.equal(value, other.state_dict()[key])}
    assert heads == {"network.classifier.weight"}


def test_a_backbone_needs_a_new_head(folder, tmp_path):
    make_vit(2).vit.save_pretrained(tmp_path / "backbone")
    asked = {"kind": "pretrained", "path": str(tmp_path / "backbone"), "num_classes": 2, "mean": MEAN, "std": STD}
    assert refusal(**asked) == (
        f"teacher.path: {asked['path']!r} lacks 2 of the weights that its configuration asks for, or has them in "
        "another shape, first classifier.bias; give a whole image classifier, or teacher.new_head=true for a new head"
    )
    assert load_classifier(**asked, new_head=True).num_classes == 2
    assert load_classifier(**asked | {"num_classes": 7}, new_head=True).num_classes == 7


def test_a_torn_backbone_is_no_matter_of_the_head(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}), encoding="utf-8")
    line = refusal(kind="pretrained", path=str(folder), new_head=True)
    assert " lacks 16 of the weights " in line and line.endswith("; give a whole image classifier")


def test_a_model_of_another_task_is_refused(teacher_folder):
    line = refusal(kind="pretrained", path=str(teacher_folder), num_classes=2, mean=MEAN, std=STD)
    assert line.startswith(f"teacher.path: AutoModelForImageClassification cannot load {str(teacher_folder)!r}: ")
    assert line.endswith("; give the folder of an image classifier")


def test_what_is_no_folder_is_taken_for_a_hub_id_and_needs_a_connection():
    line = refusal(kind="pretrained", path="owner/no-such-model", mean=MEAN, std=STD)
    assert line.startswith("teacher.path: preprocessor_config.json of 'owner/no-such-model' cannot be had: ")
    assert line.endswith("; check the name and the connection")


def test_paths_of_pretrained_are_checked(folder, tmp_path):
    save_classifier(
        load_classifier(kind="cifar", name="resnet8", num_classes=3, mean=MEAN, std=STD), tmp_path / "cifar"
    )
    weights, cifar = str(folder / "model.safetensors"), str(tmp_path / "cifar")
    (tmp_path / "empty").mkdir()
    lines = {
        (
            None,
            None,
        ): "teacher.path: kind=pretrained takes a path and no name; give a model folder or hub id as the path",
        (
            "vit",
            str(folder),
        ): "teacher.path: kind=pretrained takes a path and no name; give a model folder or hub id as the path",
        (None, weights): f"teacher.path: {weights!r} is a file; give a model folder, or kind=cifar and a name for its "
        "network",
        (None, cifar): f"teacher.kind=pretrained: {cifar!r} holds no model of transformers; set teacher.kind=cifar",
        (None, str(tmp_path / "empty")): f"teacher.path: {str(tmp_path / 'empty')!r} holds no config.json; give the "
        "folder of a saved classifier",
        (None, "/no/such"): "teacher.path: there is no folder '/no/such'; give a model folder or a hub id owner/name",
    }
    for (name, path), expected in lines.items():
        assert refusal(find_classifier, kind="pretrained", name=name, path=path) == expected


# timm


class TimmNetwork(nn.Module):
    """As much of a timm network as is used: num_classes, reset_classifier and pretrained_cfg."""

    def __init__(self):
        super().__init__()
        self.stem, self.num_classes = nn.Conv2d(3, 4, 3), 10
        self.fc = nn.Linear(4, 10)
        self.pretrained_cfg = {"mean": MEAN, "std": STD, "input_size": (3, 12, 12), "num_classes": 10}

    def reset_classifier(self, num_classes):
        self.num_classes, self.fc = num_classes, nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(self.stem(x).mean(dim=(2, 3)))


@pytest.fixture
def timm(monkeypatch):
    def create_model(name, pretrained=False):
        if name != "tiny":
            raise RuntimeError(f"Unknown model ({name})")
        network = TimmNetwork()
        if pretrained:
            nn.init.constant_(network.stem.weight, 0.5)
        return network

    module = types.ModuleType("timm")
    module.__spec__ = importlib.machinery.ModuleSpec("timm", None)
    module.create_model, module.list_models = create_model, lambda: ["tiny", "huge"]
    monkeypatch.setitem(sys.modules, "timm", module)


def test_timm_says_what_its_own_weights_need(timm):
    classifier = load_classifier(kind="timm", name="tiny", pretrained=True)
    assert classifier.spec == ClassifierSpec("timm", "tiny", 10, MEAN, STD, 12)
    assert (classifier.network.stem.weight == 0.5).all()
    assert classifier(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_a_new_network_of_timm_is_told_everything(timm):
    assert refusal(kind="timm", name="tiny").startswith("teacher.num_classes is missing")
    given = {"kind": "timm", "name": "tiny", "num_classes": 4, "mean": (0, 0, 0), "std": (1, 1, 1)}
    first, again, other = (load_classifier(**given, seed=seed) for seed in (0, 0, 1))
    assert first.spec == ClassifierSpec("timm", "tiny", 4, (0.0,) * 3, (1.0,) * 3)
    assert same(first, again) and not same(first, other) and first.network.fc.out_features == 4


def test_other_classes_than_timms_are_refused_or_get_a_new_head(timm):
    assert refusal(kind="timm", name="tiny", pretrained=True, num_classes=4) == (
        "teacher.path: timm's tiny has 10 classes and 4 are wanted; give weights for those, or set "
        "teacher.new_head=true to train a head for them"
    )
    classifier = load_classifier(kind="timm", name="tiny", pretrained=True, num_classes=4, new_head=True)
    assert classifier.num_classes == classifier.network.fc.out_features == 4
    assert (classifier.network.stem.weight == 0.5).all()


def test_a_network_of_timm_comes_back_bit_for_bit(timm, tmp_path):
    classifier = load_classifier(kind="timm", name="tiny", pretrained=True, num_classes=4, new_head=True)
    save_classifier(classifier, tmp_path)
    loaded = load_classifier(kind="timm", path=str(tmp_path))
    assert same(loaded, classifier) and loaded.spec == classifier.spec


def test_a_file_for_timm_is_loaded_or_refused(timm, tmp_path):
    file = tmp_path / "w.pth"
    torch.save({"state_dict": TimmNetwork().state_dict()}, file)
    given = {"kind": "timm", "name": "tiny", "path": str(file), "mean": MEAN, "std": STD}
    assert load_classifier(**given, num_classes=10).num_classes == 10
    assert refusal(**given, num_classes=4).startswith(f"teacher.path: {file} has 10 classes and 4 are wanted; ")
    torch.save(nn.Linear(2, 2).state_dict(), file)
    assert refusal(**given, num_classes=10) == (
        f"teacher.path: {file} does not fit tiny: 4 missing (first stem.weight), 2 unexpected (first weight); give the "
        "name of the network that it is of"
    )
    assert refusal(**given, pretrained=True).startswith("teacher.pretrained=true: is for kind=timm without a path")


def test_a_name_that_timm_does_not_know_names_the_nearest(timm):
    assert refusal(kind="timm", name="tinny") == (
        "teacher.name=tinny: timm cannot make it: Unknown model (tinny); did you mean tiny?"
    )
    assert refusal(kind="timm", name="xyz").endswith("; see timm.list_models()")


def test_timm_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert refusal(find_classifier, kind="timm", name="resnet18") == (
        "teacher.kind=timm: the package timm is not installed; run: pip install timm"
    )
