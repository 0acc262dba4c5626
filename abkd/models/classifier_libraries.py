"""Networks of transformers and timm, with what those libraries know of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from abkd.errors import InputError
from abkd.models.classifier_spec import (
    PROCESSOR,
    ClassifierSpec,
    check_classes,
    complete_spec,
    did_you_mean,
    read_processor,
)
from abkd.models.pretrained import find_model

Built = tuple[nn.Module, ClassifierSpec]


def transformers_network(path: str, values: Mapping[str, Any], new_head: bool, section: str) -> Built:
    """The image classifier in the folder or of the hub id `path`, in fp32; its `values` count before what it says.

    Raises:
        InputError: it cannot be read; it has other classes and `new_head` is False; it lacks weights.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    field = f"{section}.path"
    found = find_model(path, field)
    if found is None:
        values = {**_processor_of_the_hub(path, field), **values}
    config = _from_pretrained(AutoConfig, path, found, field)
    names = tuple(name for _, name in sorted(config.id2label.items()))
    own: dict[str, Any] = {"name": config.model_type, "num_classes": len(names)}
    if values.get("num_classes", len(names)) == len(names) and not all(name.startswith("LABEL_") for name in names):
        own["classes"] = names
    spec = complete_spec({**own, **values}, section)
    check_classes(spec.num_classes, len(names), repr(path), section, new_head=new_head)
    if spec.num_classes != len(names):
        config.num_labels = spec.num_classes
    network, report = _from_pretrained(
        AutoModelForImageClassification,
        path,
        found,
        field,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    random = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    if new_head:
        random = {name for name in random if name.startswith(f"{network.base_model_prefix}.")}
    if random:
        way_out = "give a whole image classifier" + ("" if new_head else f", or {section}.new_head=true for a new head")
        raise InputError(
            f"{field}: {path!r} lacks {len(random):,} of the weights that its configuration asks for, or has them in "
            f"another shape, first {min(random)}; {way_out}"
        )
    if spec.classes is not None:
        network.config.id2label = dict(enumerate(spec.classes))
        network.config.label2id = {name: index for index, name in enumerate(spec.classes)}
    return network, spec


def timm_network(values: Mapping[str, Any], pretrained: bool, new_head: bool, section: str) -> Built:
    """timm.create_model(name), with a head for `num_classes`; what timm says of its own weights counts after `values`.

    Raises:
        InputError: timm has no such network or cannot load it; its weights are for other classes and `new_head` is
            False.
    """
    import timm

    name, own = values["name"], {}
    try:
        network = timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # nothing of ours runs in there: whatever it is, it is about this name
        way_out = did_you_mean(name, timm.list_models(), otherwise="see timm.list_models()")
        raise InputError(f"{section}.name={name}: timm cannot make it: {_first_line(error)}; {way_out}") from error
    if pretrained:
        known = network.pretrained_cfg
        own = {"num_classes": network.num_classes, "size": known["input_size"][-1]}
        own |= {"mean": known["mean"], "std": known["std"]}
    spec = complete_spec({**own, **values}, section)
    if pretrained:
        check_classes(spec.num_classes, network.num_classes, f"timm's {name}", section, new_head=new_head)
    if spec.num_classes != network.num_classes:
        network.reset_classifier(spec.num_classes)
    return network, spec


def _processor_of_the_hub(path: str, field: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        file = hf_hub_download(path, PROCESSOR)
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return {}  # the model is there, and has none
        raise InputError(
            f"{field}: {PROCESSOR} of {path!r} cannot be had: {_first_line(error)}; check the name and the connection"
        ) from error
    return read_processor(Path(file), field)


def _from_pretrained(auto_class: Any, path: str, found: Path | None, field: str, **arguments: Any) -> Any:
    try:
        if found is None:
            return auto_class.from_pretrained(path, **arguments)
        return auto_class.from_pretrained(str(found), local_files_only=True, **arguments)
    except Exception as error:  # nothing of ours runs in there: whatever it is, it is about these files
        way_out = "check the name and the connection" if found is None else "give the folder of an image classifier"
        raise InputError(
            f"{field}: {auto_class.__name__} cannot load {path!r}: {_first_line(error)}; {way_out}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
