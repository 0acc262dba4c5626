import json
import subprocess
import sys
from pathlib import Path

import pytest

from abkd import InputError
from abkd.data.clip_sets import CLIP_SETS, KD_WEIGHTS, Split, base_and_new, of_classes, read_split, sentences

JSON_SETS = [name for name in CLIP_SETS if name != "ImageNet"]
TRIPLES = {
    "train": [["cat/1.jpg", 0, "tabby_cat"], ["fox/1.jpg", 2, "fox"], ["dog/1.jpg", 1, "dog"]],
    "val": [["dog/2.jpg", 1, "dog"]],
    "test": [["fox/3.jpg", 2, "fox"], ["cat/3.jpg", 0, "tabby_cat"]],
}


def touch(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"")


def write_json_set(root, name, triples=TRIPLES):
    """A tiny copy in the set's own folders; the folder of its images."""
    chosen = CLIP_SETS[name]
    images = root / chosen.folder / chosen.images
    for rows in triples.values():
        for path, *_ in rows:
            touch(images / path)
    (root / chosen.folder / chosen.split_file).write_text(json.dumps(triples), encoding="utf-8")
    return images


def write_imagenet(root):
    folder = root / "imagenet"
    names = {"n01": "tench", "n02": "great white shark", "n03": "cock"}
    text = "".join(f"{key} {name}\n" for key, name in names.items())
    for part, count in (("train", 2), ("val", 1)):
        for key in names:
            for number in range(count):
                touch(folder / "images" / part / key / f"{key}_{number}.JPEG")
    touch(folder / "images" / "train" / "n01" / ".hidden")
    (folder / "classnames.txt").write_text(text + "n99 not here\n", encoding="utf-8")
    return folder


def write_aircraft(root):
    folder = root / "fgvc_aircraft"
    variants = ["707-320", "A380", "DH-82"]
    for number in range(1, 7):
        touch(folder / "images" / f"{number:07}.jpg")
    (folder / "variants.txt").write_text("\n".join(variants) + "\n", encoding="utf-8")
    parts = {"train": [(1, "A380"), (2, "707-320"), (3, "DH-82")], "val": [(4, "A380")], "test": [(5, "DH-82")]}
    for part, rows in parts.items():
        lines = "".join(f"{number:07} {variant}\n" for number, variant in rows)
        (folder / f"images_variant_{part}.txt").write_text(lines, encoding="utf-8")
    return folder


def refusal(root, name) -> str:
    with pytest.raises(InputError) as caught:
        read_split(root, name)
    message = str(caught.value)
    assert message.startswith("data.") and "\n" not in message
    return message


def test_the_eleven_sets_have_the_papers_figures():
    assert len(CLIP_SETS) == 11
    rows = {name: (s.alpha, s.beta, s.num_train, *s.num_test) for name, s in CLIP_SETS.items()}
    assert rows["ImageNet"] == (0.5, 0.5, 1281167, 25000, 25000)
    assert rows["Caltech101"] == (0.8, 0.2, 4128, 1549, 916)
    assert rows["EuroSAT"] == (0.6, 0.5, 13500, 4200, 3900)
    assert rows["DTD"][:2] == (1.0, 0.2)
    assert {round(s.alpha + s.beta, 9) for s in CLIP_SETS.values()} == {1.0, 1.1, 1.2}
    assert sum(s.num_train for s in CLIP_SETS.values()) == 1392514
    assert [sum(s.num_test[half] for s in CLIP_SETS.values()) for half in (0, 1)] == [67399, 66297]
    assert KD_WEIGHTS == (100, 200, 300, 500, 1000, 2000, 3000)


def test_the_documented_table_is_that_of_the_sets():
    page = (Path(__file__).parents[2] / "docs" / "clip.md").read_text(encoding="utf-8")
    for s in CLIP_SETS.values():
        base, new = s.num_test
        assert f"| {s.name} | {s.alpha} | {s.beta} | {s.num_train:,} | {base:,} | {new:,} |" in page


def test_no_torch_is_imported():
    code = "import sys, abkd.data.clip_sets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_sentences():
    assert sentences(["tabby_cat", "fox"]) == ["a photo of a tabby cat.", "a photo of a fox."]
    assert sentences(["Pasture Land"], CLIP_SETS["EuroSAT"].template) == ["a centered satellite photo of Pasture Land."]
    assert all(chosen.template.count("{}") == 1 for chosen in CLIP_SETS.values())


@pytest.mark.parametrize("num_classes, num_base", [(1000, 500), (37, 19), (47, 24), (397, 199), (1, 1), (2, 1)])
def test_base_is_the_first_half_rounded_up(num_classes, num_base):
    base, new = base_and_new(num_classes)
    assert [*base, *new] == list(range(num_classes)) and len(base) == num_base


def test_rows_of_classes_are_renumbered():
    rows = (("a", 0), ("b", 3), ("c", 2), ("d", 1))
    base, new = base_and_new(4)
    assert of_classes(rows, base) == (("a", 0), ("d", 1))
    assert of_classes(rows, new) == (("b", 1), ("c", 0))


@pytest.mark.parametrize("name", JSON_SETS)
def test_a_split_file_is_read(tmp_path, name):
    images = write_json_set(tmp_path, name)
    assert read_split(tmp_path, name) == Split(
        class_names=("tabby_cat", "dog", "fox"),
        train=((str(images / "cat/1.jpg"), 0), (str(images / "fox/1.jpg"), 2), (str(images / "dog/1.jpg"), 1)),
        val=((str(images / "dog/2.jpg"), 1),),
        test=((str(images / "fox/3.jpg"), 2), (str(images / "cat/3.jpg"), 0)),
    )


def test_the_folders_are_those_of_coop(tmp_path):
    expected = {
        "Caltech101": "caltech-101/101_ObjectCategories", "OxfordPets": "oxford_pets/images",
        "StanfordCars": "stanford_cars", "Flowers102": "oxford_flowers/jpg", "Food101": "food-101/images",
        "FGVCAircraft": "fgvc_aircraft/images", "SUN397": "sun397/SUN397", "DTD": "dtd/images",
        "EuroSAT": "eurosat/2750", "UCF101": "ucf101/UCF-101-midframes", "ImageNet": "imagenet/images",
    }  # fmt: skip
    assert {name: str(Path(s.folder) / s.images) for name, s in CLIP_SETS.items()} == expected


def test_imagenet_is_read_from_its_folders(tmp_path):
    folder = write_imagenet(tmp_path)
    split = read_split(tmp_path, "ImageNet")
    assert split.class_names == ("tench", "great white shark", "cock") and split.val == ()
    assert [(Path(path).name, label) for path, label in split.train] == [
        (f"n0{label + 1}_{number}.JPEG", label) for label in range(3) for number in range(2)
    ]
    assert split.test[1] == (str(folder / "images/val/n02/n02_0.JPEG"), 1) and len(split.test) == 3


def test_aircraft_are_read_from_their_own_lists(tmp_path):
    folder = write_aircraft(tmp_path)
    split = read_split(tmp_path, "FGVCAircraft")
    assert split.class_names == ("707-320", "A380", "DH-82")
    assert split.train == tuple((str(folder / f"images/000000{n}.jpg"), y) for n, y in ((1, 1), (2, 0), (3, 2)))
    assert split.val == ((str(folder / "images/0000004.jpg"), 1),) and split.test[0][1] == 2


def test_a_set_that_is_not_there_is_refused():
    named = "data.clip_set='MNIST': there is no such set; use one of ImageNet, Caltech101"
    assert refusal(".", "MNIST").startswith(named)
    assert "did you mean OxfordPets? use one of" in refusal(".", "oxford_pets")


@pytest.mark.parametrize("name", CLIP_SETS)
def test_a_missing_folder_is_named(tmp_path, name):
    chosen = CLIP_SETS[name]
    assert refusal(tmp_path, name) == (
        f"data.root: {name} needs {tmp_path / chosen.folder / chosen.images}, which is not there; "
        "lay it out as CoOp's DATASETS.md says"
    )


@pytest.mark.parametrize(
    "name, file",
    [
        ("DTD", "dtd/split_zhou_DescribableTextures.json"),
        ("ImageNet", "imagenet/classnames.txt"),
        ("ImageNet", "imagenet/images/val"),
        ("ImageNet", "imagenet/images/val/n02"),
        ("FGVCAircraft", "fgvc_aircraft/variants.txt"),
        ("FGVCAircraft", "fgvc_aircraft/images_variant_test.txt"),
    ],
)
def test_a_missing_file_is_named(tmp_path, name, file):
    writers = {"ImageNet": write_imagenet, "FGVCAircraft": write_aircraft}
    writers.get(name, lambda root: write_json_set(root, name))(tmp_path)
    (tmp_path / file).rename(tmp_path / "elsewhere")
    assert f"{name} needs {tmp_path / file}, which is not there" in refusal(tmp_path, name)


def test_missing_images_are_counted_and_the_first_named(tmp_path):
    images = write_json_set(tmp_path, "EuroSAT")
    for path in ("dog/1.jpg", "cat/3.jpg"):
        (images / path).unlink()
    assert refusal(tmp_path, "EuroSAT") == (
        f"data.root: 2 of 6 images of EuroSAT are missing, first {images / 'dog/1.jpg'}; extract the whole archive"
    )


@pytest.mark.parametrize(
    "content",
    [
        "{torn",
        "[]",
        '{"train": [], "val": []}',
        '{"train": [["a.jpg", 0]], "val": [], "test": []}',
        '{"train": [["a.jpg", "x", "cat"]], "val": [], "test": []}',
        '{"train": [[3, 0, "cat"]], "val": [], "test": []}',
    ],
)
def test_a_split_of_another_form_is_refused(tmp_path, content):
    write_json_set(tmp_path, "DTD")
    file = tmp_path / "dtd" / "split_zhou_DescribableTextures.json"
    file.write_text(content, encoding="utf-8")
    message = refusal(tmp_path, "DTD")
    assert message.startswith(f"data.root: {file} is no split of [path, label, class name] in train, val, test (")
    assert message.endswith("); copy it again")


@pytest.mark.parametrize(
    "rows, reason",
    [
        ([["a", 0, "cat"], ["b", 0, "dog"]], "calls label 0 'cat' and 'dog'; give one name a label"),
        ([["a", 0, "cat"], ["b", 2, "dog"]], "has 2 labels up to 2; number them from 0, no gaps"),
        ([["a", 1, "cat"]], "has 1 labels up to 1; number them from 0, no gaps"),
        ([], "has 0 labels up to none; number them from 0, no gaps"),
    ],
)
def test_labels_and_names_that_do_not_fit_are_refused(tmp_path, rows, reason):
    write_json_set(tmp_path, "DTD", {"train": rows, "val": [], "test": []} | {"x": [["some.jpg", 0, ""]]})
    assert refusal(tmp_path, "DTD").endswith(reason)


def test_a_class_without_a_name_is_refused(tmp_path):
    folder = write_imagenet(tmp_path)
    touch(folder / "images" / "train" / "n04" / "x.JPEG")
    assert refusal(tmp_path, "ImageNet") == (
        f"data.root: {folder / 'classnames.txt'} names no class n04; copy ImageNet again"
    )


def test_an_aircraft_without_a_variant_is_refused(tmp_path):
    folder = write_aircraft(tmp_path)
    (folder / "images_variant_val.txt").write_text("0000004 A390\n", encoding="utf-8")
    message = refusal(tmp_path, "FGVCAircraft")
    assert "images_variant_val.txt has '0000004 A390', whose variant is not in variants.txt" in message
