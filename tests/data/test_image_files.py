import io
import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from abkd import InputError
from abkd.data.image_files import list_images, read_images

IMAGES = np.random.RandomState(0).randint(0, 256, (6, 4, 5, 3), dtype=np.uint8)
LABELS = [0, 1, 2, 0, 1, 2]
NAMES = ["bee", "ant", "cat"]  # not in the order of the alphabet


def png(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def read(path, split="train", **options):
    return read_images(str(path), "data.train", split=split, **options)


def write_folder(folder, images=IMAGES, suffix=".png"):
    for number, (image, label) in enumerate(zip(images, LABELS, strict=False)):
        place = folder / NAMES[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number}{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    return folder


BY_NAME = [1, 4, 0, 3, 2, 5]
"""Of the images: ants, bees, cats."""


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".PNG"])
def test_folders_of_classes(tmp_path, suffix):
    write_folder(tmp_path, suffix=suffix)
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "ant" / "._1.png").write_bytes(b"left by an archive program")
    (tmp_path / ".cache").mkdir()
    found = read(tmp_path)
    assert np.array_equal(found.images, IMAGES[BY_NAME]) and found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.images.dtype == np.uint8 and found.labels.dtype == np.int64
    assert (found.classes, found.num_grey, found.num_skipped) == (("ant", "bee", "cat"), 0, 0)
    assert found.origin == str(tmp_path)


def test_images_may_stand_deeper_in_the_folder_of_a_class(tmp_path):
    (write_folder(tmp_path) / "ant" / "more").mkdir()
    Image.fromarray(IMAGES[0]).save(tmp_path / "ant" / "more" / "9.png")
    assert read(tmp_path).labels.tolist() == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("folder", "split"), [("train", "train"), ("val", "validation"), ("valid", "validation")])
def test_folders_of_splits(tmp_path, folder, split):
    write_folder(tmp_path / folder)
    write_folder(tmp_path / "test", 255 - IMAGES)
    found, test = read(tmp_path, split), read(tmp_path, "test")
    assert np.array_equal(found.images, IMAGES[BY_NAME]) and np.array_equal(test.images, 255 - IMAGES[BY_NAME])
    assert (found.origin, test.origin) == (f"{tmp_path} [{folder}]", f"{tmp_path} [test]")
    with pytest.raises(InputError, match=rf"has no split 'dev'; it has test, {folder}"):
        read(tmp_path, "dev")


def test_a_class_may_be_named_like_a_split(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "ant").rename(tmp_path / "train")
    assert read(tmp_path).classes == ("bee", "cat", "train")


def test_a_folder_is_listed_without_opening_an_image(tmp_path):
    (write_folder(tmp_path / "train") / "bee" / "0.png").write_bytes(b"torn")
    files, labels, classes = list_images(str(tmp_path), "f", split="train")
    assert [f"{file.parent.name}/{file.name}" for file in files] == [
        f"{NAMES[LABELS[index]]}/{index}.png" for index in BY_NAME
    ]
    assert (labels.tolist(), labels.dtype, classes) == ([0, 0, 1, 1, 2, 2], np.int64, ("ant", "bee", "cat"))


def test_a_class_without_an_image_is_named(tmp_path):
    (write_folder(tmp_path) / "dog").mkdir()
    for read_or_list in (read, lambda path: list_images(str(path), "data.train", split="train")):
        with pytest.raises(InputError, match=r"data\.train: .* has no image of 'dog'"):
            read_or_list(tmp_path)


def test_a_path_without_images_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"data\.train: .* holds no images as CLASS/IMAGE"):
        read(tmp_path)
    with pytest.raises(InputError, match=r"data\.train: there is no file '.*none'"):
        read(tmp_path / "none")
    (tmp_path / "cat.png").write_bytes(png(IMAGES[0]))
    with pytest.raises(InputError, match=r"data\.train: .*cat\.png is no \.jsonl, .*; give one, or a folder"):
        read(tmp_path / "cat.png")
    with pytest.raises(InputError, match=r"there is no folder '.*none'"):
        list_images(str(tmp_path / "none"), "f", split="train")


def test_a_torn_image_is_named_or_left_out_and_counted(tmp_path):
    torn = write_folder(tmp_path) / "bee" / "3.png"
    torn.write_bytes(torn.read_bytes()[:40])
    with pytest.raises(InputError, match=rf"data\.train: {torn} cannot be read \(.*\); .* data\.on_corrupt=skip"):
        read(tmp_path)
    found = read(tmp_path, on_corrupt="skip")
    assert (found.num_skipped, found.labels.tolist()) == (1, [0, 0, 1, 2, 2])
    (tmp_path / "bee" / "0.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"has no image of 'bee'"):
        read(tmp_path, on_corrupt="skip")


def test_only_torn_images_are_no_images(tmp_path):
    for file in write_folder(tmp_path).rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(InputError, match=r"has no image \(6 could not be read\)"):
        read(tmp_path, on_corrupt="skip")


def test_images_of_several_sizes_need_one(tmp_path):
    Image.fromarray(IMAGES[5][:3]).save(write_folder(tmp_path) / "cat" / "5.png")
    with pytest.raises(InputError, match=r"cat/5\.png is 3 x 5, .*ant/1\.png 4 x 5 pixels; set data\.image_size"):
        read(tmp_path)
    assert read(tmp_path, size=3).images.shape == (6, 3, 3, 3)
    four = read(tmp_path, size=4).images  # 4 x 5: a pixel at the right or half of one at both sides is lost
    assert four.shape == (6, 4, 4, 3)


def test_grey_images_become_three_channels_and_are_counted(tmp_path):
    Image.fromarray(IMAGES[5, ..., 0]).save(write_folder(tmp_path) / "cat" / "5.png")
    found = read(tmp_path)
    assert found.num_grey == 1 and np.array_equal(found.images[5], np.dstack([IMAGES[5, ..., 0]] * 3))


FEATURES = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=NAMES)})


def saved(images=None, labels=LABELS):
    images = [Image.fromarray(image) for image in IMAGES] if images is None else images
    return datasets.Dataset.from_dict({"img": images, "fine_label": labels}, features=FEATURES)


def write_table(folder, form):
    data = saved()
    if form == "saved":
        data.save_to_disk(folder / "saved")
        return folder / "saved"
    if form == "saved splits":
        datasets.DatasetDict({"train": data, "test": data.select([0, 1, 2])}).save_to_disk(folder / "saved")
        return folder / "saved"
    table = data.with_format("arrow")[:]
    if form == "parquet":
        pyarrow.parquet.write_table(table, folder / "x.parquet", row_group_size=2)
        return folder / "x.parquet"
    if form == "arrow":
        with pyarrow.ipc.new_stream(folder / "x.arrow", table.schema) as writer:
            writer.write_table(table)
        return folder / "x.arrow"
    place = folder / {"hub": "data", "hub subset": "fine", "converted": "default/train"}[form]
    place.mkdir(parents=True)
    names = ("0000", "0001") if form == "converted" else ("train-00000-of-00002", "train-00001-of-00002")
    for name, part in zip(names, (table.slice(0, 4), table.slice(4)), strict=True):
        pyarrow.parquet.write_table(part, place / f"{name}.parquet")
    test = place.parent / "test" / "0000" if form == "converted" else place / "test-00000-of-00001"
    test.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(table.slice(0, 3), test.with_suffix(".parquet"))
    return folder


@pytest.mark.parametrize("form", ["parquet", "arrow", "saved", "saved splits", "hub", "hub subset", "converted"])
def test_tables_with_the_names_of_their_classes(tmp_path, form):
    path = write_table(tmp_path, form)
    found = read(path)
    assert np.array_equal(found.images, IMAGES) and found.labels.tolist() == LABELS
    assert (found.classes, found.num_grey) == (tuple(NAMES), 0)
    has_splits = form not in ("parquet", "arrow", "saved")
    assert found.origin == str(path) + (" [train]" if has_splits else "")
    if has_splits:
        assert read(path, "test").labels.tolist() == LABELS[:3]
        with pytest.raises(InputError, match=r"has no (split|table file of split) 'validation'; it.* test, train"):
            read(path, "validation")


def test_a_subset_is_chosen_by_its_folder(tmp_path):
    for name in ("coarse", "fine"):
        write_table(tmp_path / name, "hub")
    with pytest.raises(InputError, match=r"has tables in 2 folders, coarse/data, fine/data; give one"):
        read(tmp_path)
    assert len(read(tmp_path, subset="fine")) == 6
    with pytest.raises(InputError, match=r"has no table file of split 'train'; it has none"):
        read(tmp_path, subset="none")


def test_a_hubs_data_set(monkeypatch):
    asked = []

    def load_dataset(name, subset, *, split):
        asked.append((name, subset, split))
        if name != "someone/pets":
            raise ConnectionError("Couldn't reach it\nwith more lines")
        return saved()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read("someone/pets", subset="fine")
    assert np.array_equal(found.images, IMAGES) and found.classes == tuple(NAMES)
    assert asked == [("someone/pets", "fine", "train")] and found.origin == "someone/pets [train]"
    with pytest.raises(InputError, match=r"data\.train: the data set 'no/such' cannot be read \(Couldn't reach it\);"):
        read("no/such")


def write_rows(file, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def test_cells_may_be_bytes_paths_or_pixels(tmp_path):
    (tmp_path / "0.png").write_bytes(png(IMAGES[0]))
    encodings = {
        "bytes": png(IMAGES[0]),
        "struct": {"bytes": png(IMAGES[0]), "path": None},
        "path": "0.png",
        "struct of path": {"bytes": None, "path": "0.png"},
        "pixels": IMAGES[0].tolist(),
    }
    for name, image in encodings.items():
        found = read(write_rows(tmp_path / "x.parquet", [{"image": image, "label": "a"}]))
        assert np.array_equal(found.images, IMAGES[:1]), name
    (tmp_path / "x.jsonl").write_text(json.dumps({"image": "0.png", "label": "a"}))
    assert np.array_equal(read(tmp_path / "x.jsonl").images, IMAGES[:1])


def test_labels_may_be_names_or_numbers(tmp_path):
    images = [{"image": png(image)} for image in IMAGES]
    names = [image | {"label": NAMES[label]} for image, label in zip(images, LABELS, strict=True)]
    found = read(write_rows(tmp_path / "x.parquet", names))
    assert (found.classes, found.labels.tolist()) == (("ant", "bee", "cat"), [1, 0, 2, 1, 0, 2])
    numbers = [image | {"label": label} for image, label in zip(images, LABELS, strict=True)]
    found = read(write_rows(tmp_path / "x.parquet", numbers))
    assert (found.classes, found.labels.tolist()) == (("0", "1", "2"), LABELS)


def test_columns_are_found_or_given(tmp_path):
    rows = [{"photo": png(image), "label": 0, "kind": "k"} for image in IMAGES]
    path = write_rows(tmp_path / "x.parquet", rows)
    with pytest.raises(
        InputError, match=r"has no column image or img; it has photo, label, kind: set data\.image_column"
    ):
        read(path)
    with pytest.raises(InputError, match=r"has no column 'species'; .*: set data\.label_column"):
        read(path, image_column="photo", label_column="species")
    assert read(path, image_column="photo").classes == ("0",)
    assert read(path, image_column="photo", label_column="kind").classes == ("k",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": b"torn"}, r"x\.parquet row 3 cannot be read"),
        ({"image": None}, r"x\.parquet row 3 cannot be read"),
        ({"label": None}, r"x\.parquet row 3 has no 'label'"),
        ({"label": -1}, r"x\.parquet row 3 has the label -1, none of the 3 classes"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    rows = [{"image": png(image), "label": label} for image, label in zip(IMAGES, LABELS, strict=True)]
    rows[2] |= change
    path = write_rows(tmp_path / "x.parquet", rows)
    with pytest.raises(InputError, match=message):
        read(path)


def test_a_bad_row_of_a_saved_data_set_is_named_or_left_out(tmp_path):
    cells = [{"bytes": png(image), "path": None} for image in IMAGES]
    cells[2]["bytes"] = b"torn"
    saved(cells).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"saved row 3 cannot be read"):
        read(tmp_path / "saved")
    found = read(tmp_path / "saved", on_corrupt="skip")
    assert found.num_skipped == 1 and np.array_equal(found.images, np.delete(IMAGES, 2, axis=0))


def test_an_empty_or_torn_table_is_one_line(tmp_path):
    pyarrow.parquet.write_table(saved().with_format("arrow")[:].slice(0, 0), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet \[train\] has no row"):
        read(tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_bytes(b"PAR1torn")
    with pytest.raises(InputError, match=r"data\.train: .*y\.parquet cannot be read"):
        read(tmp_path / "y.parquet")
