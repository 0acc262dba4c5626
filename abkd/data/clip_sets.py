"""The eleven image data sets of base-to-new prompt distillation and their published splits. Imports no torch.

Source of templates, folders and splits: Zhou et al., "Learning to prompt for vision-language models", IJCV 2022, and
    its repository CoOp; of alpha, beta and the counts: the ABKD paper, Tables 5 and 6.
"""

import difflib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from abkd.data.sources import read_lines
from abkd.errors import InputError
from abkd.paths import find_path

CONTEXT = "a photo of a {}."
"""The sentence that learned text prompts start from, for every set."""
KD_WEIGHTS = (100, 200, 300, 500, 1000, 2000, 3000)
"""Where the ABKD paper searches kd_weight, with alpha and beta of the set; which one each set took is not published."""

Rows = tuple[tuple[str, int], ...]
"""(path of an image, its label from 0) each."""


@dataclass(frozen=True)
class Split:
    """A data set's images in their published parts; labels index `class_names`."""

    class_names: tuple[str, ...]
    train: Rows
    val: Rows
    test: Rows


@dataclass(frozen=True)
class ClipSet:
    """What is published of one data set."""

    name: str
    folder: str
    """In the root of all sets."""
    images: str
    """In `folder`; image paths of the split start there."""
    split_file: str
    """In `folder`; empty where the folders are the split."""
    template: str
    """The sentence of zero-shot CLIP."""
    alpha: float
    beta: float
    num_train: int
    """Images of all classes, used without labels."""
    num_test: tuple[int, int]
    """Images of the base and of the new classes."""


_SETS = (
    ClipSet("ImageNet", "imagenet", "images", "", CONTEXT, 0.5, 0.5, 1281167, (25000, 25000)),
    ClipSet("Caltech101", "caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json",
            CONTEXT, 0.8, 0.2, 4128, (1549, 916)),
    ClipSet("OxfordPets", "oxford_pets", "images", "split_zhou_OxfordPets.json",
            "a photo of a {}, a type of pet.", 0.8, 0.4, 2944, (1881, 1788)),
    ClipSet("StanfordCars", "stanford_cars", "", "split_zhou_StanfordCars.json",
            CONTEXT, 0.6, 0.4, 6509, (4002, 4039)),
    ClipSet("Flowers102", "oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json",
            "a photo of a {}, a type of flower.", 0.9, 0.1, 4093, (1053, 1410)),
    ClipSet("Food101", "food-101", "images", "split_zhou_Food101.json",
            "a photo of {}, a type of food.", 0.5, 0.5, 50500, (15300, 15000)),
    ClipSet("FGVCAircraft", "fgvc_aircraft", "images", "split_zhou_FGVCAircraft.json",
            "a photo of a {}, a type of aircraft.", 0.6, 0.5, 3334, (1666, 1667)),
    ClipSet("SUN397", "sun397", "SUN397", "split_zhou_SUN397.json", CONTEXT, 0.8, 0.2, 15880, (9950, 9900)),
    ClipSet("DTD", "dtd", "images", "split_zhou_DescribableTextures.json",
            "{} texture.", 1.0, 0.2, 2820, (864, 828)),
    ClipSet("EuroSAT", "eurosat", "2750", "split_zhou_EuroSAT.json",
            "a centered satellite photo of {}.", 0.6, 0.5, 13500, (4200, 3900)),
    ClipSet("UCF101", "ucf101", "UCF-101-midframes", "split_zhou_UCF101.json",
            "a photo of a person doing {}.", 0.8, 0.2, 7639, (1934, 1849)),
)  # fmt: skip
CLIP_SETS: dict[str, ClipSet] = {chosen.name: chosen for chosen in _SETS}
"""Name, as in the paper's tables -> set."""


def sentences(class_names: Iterable[str], template: str = CONTEXT) -> list[str]:
    """`template` with each class name in its braces, underscores read as spaces."""
    return [template.replace("{}", name.replace("_", " ")) for name in class_names]


def base_and_new(num_classes: int) -> tuple[range, range]:
    """Labels of the base classes, the first half rounded up, and of the new ones, the rest."""
    half = (num_classes + 1) // 2
    return range(half), range(half, num_classes)


def of_classes(rows: Sequence[tuple[str, int]], classes: range) -> Rows:
    """The rows of these classes, labels counted from the first of them."""
    return tuple((path, label - classes.start) for path, label in rows if label in classes)


def read_split(root: str | Path, name: str, field: str = "data.root") -> Split:
    """The published split of the set `name`, laid out under `root` as CoOp's DATASETS.md says.

    From `split_zhou_*.json`; FGVCAircraft without one from its own lists of variants; ImageNet from its folders and
    `classnames.txt`, without a validation part.

    Args:
        root: as in a recipe, the folder of all sets.
        field: the recipe's field, named in the errors.

    Raises:
        InputError: there is no such set; a file or an image is missing, torn or of another form.
    """
    if name not in CLIP_SETS:
        near = difflib.get_close_matches(name.lower(), [each.lower() for each in CLIP_SETS], n=1)
        hint = "".join(f"did you mean {each}? " for each in CLIP_SETS if each.lower() in near)
        raise InputError(f"data.clip_set={name!r}: there is no such set; {hint}use one of {', '.join(CLIP_SETS)}")
    chosen = CLIP_SETS[name]
    folder = find_path(str(root), field) / chosen.folder
    _need(folder / chosen.images, Path.is_dir, name, field)
    if not chosen.split_file:
        return _from_folders(folder, name, field)
    if name == "FGVCAircraft" and not (folder / chosen.split_file).is_file():
        split = _from_variants(folder, name, field)
    else:
        split = _from_json(folder / chosen.split_file, folder / chosen.images, name, field)
    paths = [path for part in (split.train, split.val, split.test) for path, _ in part]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise InputError(
            f"{field}: {len(missing):,} of {len(paths):,} images of {name} are missing, first {missing[0]}; "
            "extract the whole archive"
        )
    return split


def _from_json(file: Path, images: Path, name: str, field: str) -> Split:
    """`{"train": [[path, label, class name], ...], "val": ..., "test": ...}`"""
    _need(file, Path.is_file, name, field)
    names: dict[int, str] = {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        parts = {
            part: tuple((str(images / path), int(label), str(class_name)) for path, label, class_name in content[part])
            for part in ("train", "val", "test")
        }
    except (ValueError, TypeError, LookupError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{field}: {file} is no split of [path, label, class name] in train, val, test ({reason}); copy it again"
        ) from None
    for _, label, class_name in (row for rows in parts.values() for row in rows):
        if names.setdefault(label, class_name) != class_name:
            raise InputError(
                f"{field}: {file} calls label {label} {names[label]!r} and {class_name!r}; give one name a label"
            )
    if not names or sorted(names) != list(range(len(names))):
        raise InputError(
            f"{field}: {file} has {len(names)} labels up to {max(names, default='none')}; number them from 0, no gaps"
        )
    rows = {part: tuple((path, label) for path, label, _ in rows) for part, rows in parts.items()}
    return Split(tuple(names[label] for label in sorted(names)), **rows)


def _from_variants(folder: Path, name: str, field: str) -> Split:
    """Class names by line in `variants.txt`; image and class name by line in `images_variant_PART.txt`."""
    class_names = tuple(_lines(folder / "variants.txt", name, field))
    labels = {class_name: label for label, class_name in enumerate(class_names)}
    parts = {}
    for part in ("train", "val", "test"):
        file, rows = folder / f"images_variant_{part}.txt", []
        for line in _lines(file, name, field):
            image, _, class_name = line.partition(" ")
            if class_name not in labels:
                raise InputError(f"{field}: {file} has {line!r}, whose variant is not in variants.txt; copy both again")
            rows.append((str(folder / "images" / f"{image}.jpg"), labels[class_name]))
        parts[part] = tuple(rows)
    return Split(class_names, **parts)


def _from_folders(folder: Path, name: str, field: str) -> Split:
    """A folder per class in `images/train` and `images/val`, in order of the labels; the latter is the test part."""
    known = dict(line.split(" ", 1) for line in _lines(folder / "classnames.txt", name, field) if " " in line)
    parts = [_need(folder / "images" / part, Path.is_dir, name, field) for part in ("train", "val")]
    classes = sorted(entry.name for entry in os.scandir(parts[0]) if entry.is_dir())
    nameless = [each for each in classes if each not in known]
    if nameless or not classes:
        what = f"names no class {nameless[0]}" if nameless else f"is alone: {parts[0]} has no folder of a class"
        raise InputError(f"{field}: {folder / 'classnames.txt'} {what}; copy {name} again")
    train, test = (
        tuple(
            (str(part / each / image), label)
            for label, each in enumerate(classes)
            for image in sorted(os.listdir(_need(part / each, Path.is_dir, name, field)))
            if not image.startswith(".")
        )
        for part in parts
    )
    return Split(tuple(known[each] for each in classes), train, (), test)


def _need(path: Path, there: Callable[[Path], bool], name: str, field: str) -> Path:
    if not there(path):
        raise InputError(f"{field}: {name} needs {path}, which is not there; lay it out as CoOp's DATASETS.md says")
    return path


def _lines(file: Path, name: str, field: str) -> list[str]:
    lines = read_lines(_need(file, Path.is_file, name, field), field)
    return [line.strip() for _, line in lines if line.strip()]
