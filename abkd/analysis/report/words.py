"""Recipes in a few words, and where their divergence lies in the plane of alpha and beta."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

NAMES = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "symmetric_kl": "symmetric KL",
    "jsd": "JSD",
    "skewed_forward_kl": "skewed forward KL",
    "skewed_reverse_kl": "skewed reverse KL",
    "total_variation": "total variation",
    "alphanet": "AlphaNet",
    "wsd": "WSD", "akl": "AKL", "bdkd": "BDKD", "dkd": "DKD", "lsd": "LSD", "ttm": "TTM", "wttm": "WTTM",
    "dist": "DIST", "mlkd": "MLKD",
}  # fmt: skip
POINTS = {"forward_kl": (1.0, 0.0), "reverse_kl": (0.0, 1.0)}
NAMED = {"forward KL": (1.0, 0.0), "reverse KL": (0.0, 1.0), "Hellinger": (0.5, 0.5), "squared Euclid": (1.0, 1.0)}
"""Landmarks of the plane."""


class Measure(NamedTuple):
    title: str
    form: str
    """Of the number in a cell."""
    unit: str = ""
    better: str = ""
    """lower, higher, or nothing where neither is."""


MEASURES = {
    "top1": Measure("top-1", "{:.2%}", "share of the test images", "higher"),
    "top5": Measure("top-5", "{:.2%}", "share of the test images", "higher"),
    "forward_kl": Measure("forward KL", "{:.3f}", "nats", "lower"),
    "reverse_kl": Measure("reverse KL", "{:.3f}", "nats", "lower"),
    "alpha_beta": Measure("α-β (.2, .7)", "{:.3f}", "nats", "lower"),
    "token_agreement": Measure("agreement", "{:.1%}", "share of tokens", "higher"),
    "agreement": Measure("agreement", "{:.1%}", "share of images", "higher"),
    "next_token_loss": Measure("next-token loss", "{:.3f}", "nats", "lower"),
    "cross_entropy": Measure("cross-entropy", "{:.3f}", "nats", "lower"),
    "rouge_l": Measure("ROUGE-L", "{:.1f}", "0 to 100", "higher"),
    "sets_mean": Measure("sets’ mean", "{:.1f}", "0 to 100", "higher"),
    "entropy": Measure("entropy", "{:.3f}", "nats"),
    "softened_entropy": Measure("softened entropy", "{:.3f}", "nats"),
    "calibration_error": Measure("calibration error", "{:.3f}", "", "lower"),
    "num_parameters": Measure("parameters", "{:,.0f}"),
}
CHOICE = ("sets_mean", "rouge_l", "top1", "token_agreement", "next_token_loss")
"""What the plane is coloured by, the first that there is: none is a divergence that a run may have minimised."""


def measure_of(key: str) -> Measure:
    return MEASURES.get(key, Measure(key.replace("_", " "), "{:.4g}"))


def number_words(form: str, value: float | None) -> str:
    """The number as it stands in a table; a dash where there is none."""
    if value is None:
        return "–"
    if math.isfinite(value):
        return form.format(value).replace("-", "−")
    return "nan" if math.isnan(value) else "∞" if value > 0 else "−∞"


def objective_words(recipe: Mapping[str, Any]) -> str:
    """What is minimised."""
    objective = recipe.get("objective")
    if not isinstance(objective, Mapping):
        return "unknown objective"
    terms = []
    kd, ce = objective.get("kd_weight", 1.0), objective.get("ce_weight", 0.0)
    if calibration := objective.get("calibration"):
        inner = calibration.get("divergence")
        terms.append(_weighted(kd, kind_words(calibration) + (f" of {divergence_words(inner)}" if inner else "")))
    elif divergence := objective.get("divergence"):
        terms.append(_weighted(kd, divergence_words(divergence)))
    if ce:
        terms.append(_weighted(ce, "cross-entropy"))
    return " + ".join(term for term in terms if term) or "nothing"


def divergence_words(section: Mapping[str, Any]) -> str:
    if section.get("kind") == "alpha_beta":
        return f"α-β ({_exponent(section.get('alpha', 0.2))}, {_exponent(section.get('beta', 0.7))})"
    parameters = ", ".join(f"{key} {plain(value)}" for key, value in section.items() if key != "kind")
    return kind_words(section) + (f" ({parameters})" if parameters else "")


def kind_words(section: Mapping[str, Any]) -> str:
    kind = str(section.get("kind"))
    return NAMES.get(kind, kind.replace("_", " "))


def path_in_plane(recipe: Mapping[str, Any]) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """((alpha, beta) at the first step, the same at the last); None for a divergence that is not of the plane."""
    objective = recipe.get("objective") or {}
    section = objective.get("divergence") or (objective.get("calibration") or {}).get("divergence") or {}
    if not objective.get("kd_weight", 1.0):
        return None
    if section.get("kind") in POINTS:
        return POINTS[section["kind"]], POINTS[section["kind"]]
    if section.get("kind") != "alpha_beta":
        return None
    (first, last), (low, high) = _ends(section.get("alpha", 0.2)), _ends(section.get("beta", 0.7))
    return (first, low), (last, high)


def model_words(section: Any) -> str:
    """A teacher or student in a few words."""
    if not isinstance(section, Mapping):
        return "none"
    name = section.get("path") or section.get("name") or section.get("kind") or "unknown"
    match section.get("kind"):
        case "shrink":
            layers = section.get("layers") or []
            name = f"{section.get('keep_layers') or len(layers)} layers of {section.get('path') or 'the teacher'}"
        case "cached":
            name = f"the cache {name}"
        case "served":
            name = f"{section.get('model')} at {section.get('url')}"
        case "mixture":
            name = f"a mixture of {' and '.join(map(model_words, section.get('teachers') or []))}"
    if lora := section.get("lora"):
        name = f"{name}, LoRA of rank {lora.get('rank')}"
    return str(name)


def value_words(key: str, value: Any) -> str:
    return f"{key.rpartition('.')[2].replace('_', ' ')} {plain(value)}"


def plain(value: Any) -> str:
    """A recipe's value for people."""
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or value == "" or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(plain, value)) if isinstance(value, list) else str(value)


def _weighted(weight: Any, words: str) -> str:
    if not weight:
        return ""
    return words if weight == 1 else f"{plain(weight)} · {words}"


def _ends(exponent: Any) -> tuple[float, float]:
    if not isinstance(exponent, Mapping):
        return float(exponent), float(exponent)
    first = float(exponent.get("from", 0))
    return first, first if exponent.get("shape") == "constant" else float(exponent.get("to", first))


def _exponent(exponent: Any) -> str:
    first, last = _ends(exponent)
    return f"{first:g}" if first == last else f"{first:g}→{last:g}"


def facts(recipe: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, str]:
    """What was trained on what, how and where: title -> words."""
    data, training, rollouts = recipe["data"], recipe["training"], recipe.get("rollouts") or {}
    temperature = (recipe["objective"].get("calibration") or recipe["objective"]).get("temperature")
    versions = environment.get("versions")
    versions = dict(versions) if isinstance(versions, Mapping) else {}
    if environment.get("python"):
        versions = versions | {"Python": environment["python"]}
    made_by = ", ".join(f"{name} {version}" for name, version in versions.items())
    machine = (environment.get("platform"), environment.get("num_cpus") and f"{environment['num_cpus']} CPUs")
    found = {
        "Task": str(recipe.get("task", "")).replace("_", " "),
        "Teacher": model_words(recipe.get("teacher")),
        "Student": model_words(recipe.get("student")),
        "Objective": objective_words(recipe),
        "Temperature": None if temperature is None else plain(temperature),
        "Data": str(data.get("train", "")),
        "Test images" if "test" in data else "Validation": plain(data.get("validation") or data.get("test"))
        if "num_held_out" not in data
        else _held_out(data),
        "Rollouts": None if rollouts.get("kind", "fixed") == "fixed" else kind_words(rollouts),
        "Length": _length(training),
        "Batch": _batch(training),
        "Learning rate": f"{plain(training.get('learning_rate'))}, {training.get('schedule', 'schedule unknown')}",
        "Precision": training.get("precision"),
        "Seed": plain(training.get("seed", 0)),
        "Hardware": ", ".join(str(each) for each in machine if each),
        "Processes": environment.get("num_processes"),
        "Commit": environment.get("commit"),
        "Versions": made_by,
        "Started": str(environment.get("started", "")).replace("T", " ").replace("+00:00", " UTC"),
    }
    return {title: str(words) for title, words in found.items() if words not in (None, "")}


def _held_out(data: Mapping[str, Any]) -> str:
    return plain(data["validation"]) if data.get("validation") else f"{data['num_held_out']} rows held out"


def _batch(training: Mapping[str, Any]) -> str:
    several = training.get("accumulation", 1)
    return f"{training.get('batch_size')} examples" + (f" × {several} micro-batches" if several != 1 else "")


def _length(training: Mapping[str, Any]) -> str:
    if training.get("num_steps"):
        return f"{training['num_steps']:,} steps"
    return f"{plain(training.get('num_epochs'))} epochs"
