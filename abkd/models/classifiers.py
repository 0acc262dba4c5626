"""Image classifiers found, loaded and saved: networks of the CIFAR table, of transformers, of timm.

Imports no torch at the top, so that a wrong path or name is refused at once.
"""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from abkd.errors import InputError
from abkd.models.cifar import CIFAR_MODELS
from abkd.models.classifier_spec import (
    PROCESSOR,
    WEIGHTS,
    Kind,
    complete_spec,
    did_you_mean,
    read_config,
    read_processor,
    write_config,
    write_processor,
)
from abkd.models.pretrained import check_safetensors, find_model
from abkd.paths import find_path

if TYPE_CHECKING:
    from torch import nn

    from abkd.models.image_classifier import ImageClassifier


def find_classifier(
    *, kind: Kind, name: str | None = None, path: str | None = None, section: str = "classifier"
) -> dict[str, Any]:
    """What is known of a classifier before it is loaded; headers are read, and no torch is imported.

    Args:
        kind: cifar for a network of `CIFAR_MODELS`, pretrained for an image classifier of transformers, timm.
        name: of the network, for cifar and timm; a saved folder says it.
        path: a file of weights or a folder of `save_classifier` for cifar and timm; for pretrained a folder in Hugging
            Face format or a hub id.
        section: of the recipe, as in teacher; errors name teacher.name or teacher.path.

    Returns:
        Values of `ClassifierSpec` that the folder says, unchecked.

    Raises:
        InputError: there is no such network, file or folder, or it is torn or of another kind.
    """
    if kind not in get_args(Kind):
        raise InputError(f"{section}.kind={kind}: must be one of {', '.join(get_args(Kind))}")
    if kind == "pretrained":
        return _find_transformers(name, path, section)
    said = _find_weights(kind, path, section) if path is not None else {}
    if name is not None and said.get("name", name) != name:
        raise InputError(f"{section}.name={name}: {path!r} holds {said['name']}; leave the name out")
    name = said.get("name", name)
    if name is None:
        raise InputError(f"{section}.name is missing; give the network's name, as in resnet20")
    if kind == "cifar" and name not in CIFAR_MODELS:
        way_out = did_you_mean(
            str(name).lower().replace("-", "_"), CIFAR_MODELS, otherwise=f"there are {', '.join(CIFAR_MODELS)}"
        )
        raise InputError(f"{section}.name={name}: there is no such network; {way_out}")
    if kind == "timm" and importlib.util.find_spec("timm") is None:
        raise InputError(f"{section}.kind=timm: the package timm is not installed; run: pip install timm")
    return said | {"name": name}


def load_classifier(
    *,
    kind: Kind,
    name: str | None = None,
    path: str | None = None,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
    classes: Sequence[str] | None = None,
    pretrained: bool = False,
    new_head: bool = False,
    seed: int = 0,
    section: str = "classifier",
) -> ImageClassifier:
    """The classifier in evaluation mode, on the CPU, in fp32.

    Args:
        kind, name, path, section: see `find_classifier`; without a path the weights are new, drawn from `seed`.
        num_classes, mean, std, size, classes: see `ClassifierSpec`. What is given counts for more than what a folder,
            transformers' `preprocessor_config.json` or timm says.
        pretrained: for timm without a path, its own weights, which it downloads.
        new_head: with weights of another number of classes, a new head is drawn from `seed`; refused otherwise. With
            the same number of classes the head stays.

    Raises:
        InputError: as `find_classifier`; a value is missing or out of range; the weights do not fit the network.
    """
    import torch

    from abkd.models.classifier_libraries import timm_network, transformers_network
    from abkd.models.image_classifier import ImageClassifier
    from abkd.models.state_dicts import load_weights

    if pretrained and (kind != "timm" or path is not None):
        raise InputError(f"{section}.pretrained=true: is for kind=timm without a path; leave it out")
    said = find_classifier(kind=kind, name=name, path=path, section=section)
    given = {"num_classes": num_classes, "mean": mean, "std": std, "size": size, "classes": classes}
    if num_classes not in (None, said.get("num_classes")):
        said.pop("classes", None)  # names of other classes
    values = said | {key: value for key, value in given.items() if value is not None} | {"kind": kind}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if kind == "pretrained":
            return ImageClassifier(*transformers_network(str(path), values, new_head, section)).eval()
        if kind == "timm":
            network, spec = timm_network(values, pretrained, new_head, section)
        else:
            spec = complete_spec(values, section)
            network = CIFAR_MODELS[spec.name](spec.num_classes)
    if path is not None:
        found = find_path(path, f"{section}.path")
        others = _cifar_networks(spec.num_classes) if kind == "cifar" else ()
        file = found / WEIGHTS if found.is_dir() else found
        load_weights(network, file, spec.name, section, new_head=new_head, others=others)
    return ImageClassifier(network, spec).eval()


def save_classifier(classifier: ImageClassifier, folder: Path) -> None:
    """Writes what `load_classifier(kind=..., path=folder)` reads; transformers' models as transformers does.

    A folder that is torn by a crash in between is the caller's to avoid: write aside, then rename.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec, network = classifier.spec, classifier.network
    if spec.kind == "pretrained":
        network.save_pretrained(folder)  # type: ignore[operator]
        write_processor(spec, folder)
        return
    from safetensors.torch import save_file

    state = {key: tensor.detach().cpu().clone() for key, tensor in network.state_dict().items()}
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / WEIGHTS, {"format": "pt"})
    write_config(spec, folder)


def _find_weights(kind: Kind, path: str, section: str) -> dict[str, Any]:
    field, found = f"{section}.path", find_path(path, f"{section}.path")
    if found.is_file():
        if found.suffix == ".safetensors":
            check_safetensors(found, field)
        else:
            _check_torch_file(found, field)
        return {}
    if not found.is_dir():
        siblings = [file.name for file in found.parent.iterdir()] if found.parent.is_dir() else []
        way_out = did_you_mean(found.name, siblings, "give a file of weights or the folder of a saved classifier")
        raise InputError(f"{field}: there is no file {path!r}; {way_out}")
    said = read_config(found, field)
    there = "pretrained" if "model_type" in said else said.get("kind")
    if there != kind:
        way_out = f"set {section}.kind={there}" if there else "give the folder of a saved classifier"
        raise InputError(f"{section}.kind={kind}: {path!r} holds no classifier of this kind; {way_out}")
    if not (found / WEIGHTS).is_file():
        raise InputError(f"{field}: {path!r} holds no {WEIGHTS}; copy the folder again")
    check_safetensors(found / WEIGHTS, field)
    return {key: said[key] for key in ("name", "num_classes", "mean", "std", "size", "classes") if key in said}


def _find_transformers(name: str | None, path: str | None, section: str) -> dict[str, Any]:
    field = f"{section}.path"
    if name is not None or path is None:
        raise InputError(
            f"{field}: kind=pretrained takes a path and no name; give a model folder or hub id as the path"
        )
    folder = find_path(path, field)
    if folder.is_file():
        raise InputError(f"{field}: {path!r} is a file; give a model folder, or kind=cifar and a name for its network")
    if folder.is_dir():
        said = read_config(folder, field)
        if "model_type" not in said:
            way_out = f"set {section}.kind={said['kind']}" if "kind" in said else "give a folder of save_pretrained"
            raise InputError(f"{section}.kind=pretrained: {path!r} holds no model of transformers; {way_out}")
    find_model(path, field)
    return read_processor(folder / PROCESSOR, field) if (folder / PROCESSOR).is_file() else {}


def _check_torch_file(file: Path, field: str) -> None:
    """Is it what torch.save writes, and whole? By its first bytes and its end."""
    with file.open("rb") as stream:
        start = stream.read(4)
    if start == b"PK\x03\x04" and not zipfile.is_zipfile(file):
        raise InputError(f"{field}: {file} is torn; copy it again")
    if start != b"PK\x03\x04" and not start.startswith(b"\x80"):
        raise InputError(
            f"{field}: {file} is no file of torch.save or safetensors; give a file that holds a state dict"
        )


def _cifar_networks(num_classes: int) -> Iterator[tuple[str, nn.Module]]:
    """The table's networks one by one, without memory for their weights."""
    import torch

    for name, build in CIFAR_MODELS.items():
        with torch.device("meta"):  # and left before the caller goes on
            network = build(num_classes)
        yield name, network
