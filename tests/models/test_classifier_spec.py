"""What a classifier's images and logits mean: checked, written as JSON, read as transformers writes it."""

import json
import math
from dataclasses import asdict

import pytest

from abkd.errors import InputError
from abkd.models.classifier_spec import (
    ClassifierSpec,
    check_classes,
    complete_spec,
    read_config,
    read_processor,
    write_config,
    write_processor,
)

VALUES = {"kind": "cifar", "name": "resnet8", "num_classes": 3, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_lists_become_tuples_and_none_is_not_there():
    spec = complete_spec(VALUES | {"mean": [0, 1, 0.5], "size": None, "classes": ["a", "b", "c"]}, "teacher")
    assert spec == ClassifierSpec("cifar", "resnet8", 3, (0.0, 1.0, 0.5), (0.2, 0.3, 0.4), None, ("a", "b", "c"))
    hash(spec)


@pytest.mark.parametrize(
    ("key", "way_out"),
    [
        ("num_classes", "give the number of classes"),
        ("mean", "give the three means that the network's images are normalised with, in 0..1"),
        ("std", "give the three standard deviations that the network's images are normalised with, in 0..1"),
    ],
)
def test_what_is_missing_is_named(key, way_out):
    expected = f"teacher.{key} is missing, and no file says it; {way_out}"
    assert refusal(complete_spec, VALUES | {key: None}, "teacher") == expected


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("num_classes", 1, "must be a whole number, at least 2"),
        ("num_classes", 2.0, "must be a whole number, at least 2"),
        ("num_classes", True, "must be a whole number, at least 2"),
        ("mean", (0.5, 0.5), "must be three numbers, of red, green and blue in 0..1"),
        ("mean", 0.5, "must be three numbers, of red, green and blue in 0..1"),
        ("std", ("a", 1, 1), "must be three numbers, of red, green and blue in 0..1"),
        ("std", (math.nan, 1, 1), "must be three numbers, of red, green and blue in 0..1"),
        ("std", (1.0, 0.0, 1.0), "images are divided by it; give three numbers above 0"),
        ("size", 0, "must be a whole number above 0; images are resized to size x size"),
        ("size", {"height": 3, "width": 4}, "must be a whole number above 0; images are resized to size x size"),
        ("classes", ("a", "b"), "must be 3 names, one for each class"),
        ("classes", "abc", "must be 3 names, one for each class"),
    ],
)
def test_what_is_out_of_range_is_refused(key, value, reason):
    assert refusal(complete_spec, VALUES | {key: value}, "student") == f"student.{key}={value!r}: {reason}"


def test_other_classes_need_a_new_head():
    check_classes(5, 5, "x.pth", "teacher", new_head=False)
    check_classes(5, 9, "x.pth", "teacher", new_head=True)
    assert refusal(check_classes, 5, 9, "x.pth", "teacher", new_head=False) == (
        "teacher.path: x.pth has 9 classes and 5 are wanted; give weights for those, or set "
        "teacher.new_head=true to train a head for them"
    )


def test_a_specification_survives_its_file(tmp_path):
    spec = complete_spec(VALUES | {"mean": (1 / 3, 0.1, 2 / 7), "classes": ["é", "b", "c"], "size": 64}, "teacher")
    write_config(spec, tmp_path)
    assert complete_spec(read_config(tmp_path, "teacher.path"), "teacher") == spec
    assert set(asdict(spec)) == set(json.loads((tmp_path / "config.json").read_text(encoding="utf-8")))


def test_a_folder_without_a_whole_configuration_is_refused(tmp_path):
    assert refusal(read_config, tmp_path, "teacher.path") == (
        f"teacher.path: {str(tmp_path)!r} holds no config.json; give the folder of a saved classifier"
    )
    for content in (b'{"kind": ', b"[]", b"\xff\xfe"):
        (tmp_path / "config.json").write_bytes(content)
        assert refusal(read_config, tmp_path, "teacher.path") == (
            f"teacher.path: {tmp_path / 'config.json'} is torn or no JSON object; copy it again"
        )


# preprocessor_config.json

MEAN, STD = [0.5, 0.25, 0.125], [0.25, 0.5, 1.0]
PROCESSORS = {
    "as today": (
        {"do_resize": True, "size": {"height": 224, "width": 224}, "do_rescale": True, "rescale_factor": 1 / 255,
         "do_normalize": True, "image_mean": MEAN, "image_std": STD},
        {"mean": tuple(MEAN), "std": tuple(STD), "size": 224},
    ),
    "as of old": (
        {"do_normalize": True, "do_resize": True, "image_mean": MEAN, "image_std": STD, "size": 224},
        {"mean": tuple(MEAN), "std": tuple(STD), "size": 224},
    ),
    "a crop": (
        {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 240, "width": 240},
         "image_mean": MEAN, "image_std": STD},
        {"mean": tuple(MEAN), "std": tuple(STD), "size": 240},
    ),
    "a shortest edge": ({"size": {"shortest_edge": 288}}, {"size": 288}),
    "no square": ({"size": {"height": 3, "width": 4}}, {"size": {"height": 3, "width": 4}}),
    "no resizing": ({"do_resize": False, "size": 224}, {}),
    "no normalisation": ({"do_normalize": False}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
    "more than that": ({"rescale_offset": True, "image_mean": MEAN, "image_std": STD, "size": 9}, {"size": 9}),
    "normalised twice": ({"include_top": True, "image_mean": MEAN, "image_std": STD}, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_processor_is_read(tmp_path, kind):
    said, expected = PROCESSORS[kind]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said), encoding="utf-8")
    assert read_processor(tmp_path / "preprocessor_config.json", "teacher.path") == expected


@pytest.mark.parametrize(
    "said", [{"do_rescale": False}, {"rescale_factor": 1 / 127.5}, {"do_rescale": True, "rescale_factor": 0.02}]
)
def test_a_rescale_factor_is_part_of_the_normalisation(tmp_path, said):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": MEAN, "image_std": STD} | said), encoding="utf-8")
    values = read_processor(file, "teacher.path")
    factor = said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1
    for pixel in (0, 17, 255):
        for channel in range(3):
            theirs = (pixel * factor - MEAN[channel]) / STD[channel]
            ours = (pixel / 255 - values["mean"][channel]) / values["std"][channel]
            assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("size", [None, 48])
def test_a_written_processor_is_read_as_it_was(tmp_path, size):
    spec = complete_spec(VALUES | {"mean": (1 / 3, 0.1, 2 / 7), "size": size}, "teacher")
    write_processor(spec, tmp_path)
    values = read_processor(tmp_path / "preprocessor_config.json", "teacher.path")
    assert (values["mean"], values["std"], values.get("size")) == (spec.mean, spec.std, size)
