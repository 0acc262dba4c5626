"""What an image classifier takes and gives, apart from its weights, and how files say it. Imports no torch."""

import difflib
import json
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from abkd.errors import InputError

Kind = Literal["cifar", "pretrained", "timm"]
CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"


@dataclass(frozen=True)
class ClassifierSpec:
    """How to build a classifier's network, and what its images and logits mean.

    Raises:
        InputError: a value is out of its range; the line begins with its name.
    """

    kind: Kind
    name: str
    """In `CIFAR_MODELS`, in timm's list, or the class of a transformers model."""
    num_classes: int
    """At least 2."""
    mean: tuple[float, float, float]
    """Of red, green and blue in 0..1, taken off the images."""
    std: tuple[float, float, float]
    """> 0; the images are divided by it then."""
    size: int | None = None
    """Images are resized to size x size pixels before; None leaves them as they are."""
    classes: tuple[str, ...] | None = None
    """Names in the order of the logits, where they are known."""

    def __post_init__(self):
        if not _is_whole(self.num_classes) or self.num_classes < 2:
            raise InputError(f"num_classes={self.num_classes!r}: must be a whole number, at least 2")
        for key in ("mean", "std"):
            values = getattr(self, key)
            if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(_is_finite(v) for v in values):
                raise InputError(f"{key}={values!r}: must be three numbers, of red, green and blue in 0..1")
            object.__setattr__(self, key, tuple(float(value) for value in values))
        if min(self.std) <= 0:
            raise InputError(f"std={self.std!r}: images are divided by it; give three numbers above 0")
        if self.size is not None and (not _is_whole(self.size) or self.size < 1):
            raise InputError(f"size={self.size!r}: must be a whole number above 0; images are resized to size x size")
        if self.classes is not None:
            if not isinstance(self.classes, (list, tuple)) or len(self.classes) != self.num_classes:
                raise InputError(f"classes={self.classes!r}: must be {self.num_classes} names, one for each class")
            object.__setattr__(self, "classes", tuple(str(name) for name in self.classes))


def complete_spec(values: Mapping[str, Any], section: str) -> ClassifierSpec:
    """The specification of `values`, where None is not there. Raises InputError with the recipe's field."""
    values = {key: value for key, value in values.items() if value is not None}
    for key, way_out in (
        ("num_classes", "give the number of classes"),
        ("mean", "give the three means that the network's images are normalised with, in 0..1"),
        ("std", "give the three standard deviations that the network's images are normalised with, in 0..1"),
    ):
        if key not in values:
            raise InputError(f"{section}.{key} is missing, and no file says it; {way_out}")
    try:
        return ClassifierSpec(**values)
    except InputError as error:
        raise InputError(f"{section}.{error}") from None


def check_classes(wanted: int, there: int, origin: str, section: str, *, new_head: bool) -> None:
    """Refuses weights of another number of classes, unless a new head is asked for."""
    if wanted != there and not new_head:
        raise InputError(
            f"{section}.path: {origin} has {there} classes and {wanted} are wanted; give weights for those, or set "
            f"{section}.new_head=true to train a head for them"
        )


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The way out of an unknown name: the known ones nearest to it, `otherwise` where none is near."""
    near = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {', '.join(near)}?" if near else otherwise


def read_config(folder: Path, field: str) -> dict[str, Any]:
    """What the folder's `config.json` holds, ours or transformers'. Raises InputError: it is missing or torn."""
    if not (folder / CONFIG).is_file():
        raise InputError(f"{field}: {str(folder)!r} holds no {CONFIG}; give the folder of a saved classifier")
    return _read_json(folder / CONFIG, field)


def read_processor(file: Path, field: str) -> dict[str, Any]:
    """Mean, standard deviation and size in transformers' `preprocessor_config.json`, as far as it says them.

    (c x - m) / s for x in 0..255, c the rescale factor, is (x / 255 - m / (255 c)) / (s / (255 c)). A crop of the
    centre is not made: the whole image is resized to the crop's size.

    Returns:
        Some of `mean`, `std`, `size`, unchecked; not the first two where the processor does more than normalise.
    """
    said, values = _read_json(file, field), {}
    scale = 255 * said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 255
    if not said.get("do_normalize", True):
        said |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    if not said.get("rescale_offset") and not said.get("include_top"):
        for key, name in (("mean", "image_mean"), ("std", "image_std")):
            if name in said:
                values[key] = tuple(value / scale for value in said[name])
    if said.get("do_center_crop") and "crop_size" in said:
        values["size"] = _edge(said["crop_size"])
    elif said.get("do_resize", True) and "size" in said:
        values["size"] = _edge(said["size"])
    return values


def write_config(spec: ClassifierSpec, folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps(asdict(spec), indent=2) + "\n", encoding="utf-8")


def write_processor(spec: ClassifierSpec, folder: Path) -> None:
    """As transformers reads it."""
    values = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": spec.mean,
        "image_std": spec.std,
        "do_resize": spec.size is not None,
        "resample": 2,  # bilinear
    }
    if spec.size is not None:
        values["size"] = {"height": spec.size, "width": spec.size}
    (folder / PROCESSOR).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _edge(size: Any) -> Any:
    """The one edge of a square; what is none stays as it is, to be refused where nobody gives another."""
    if not isinstance(size, dict):
        return size
    edges = {size[key] for key in ("height", "width", "shortest_edge") if key in size}
    return edges.pop() if len(edges) == 1 else size


def _read_json(file: Path, field: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{field}: {file} is torn or no JSON object; copy it again")
    return content


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
