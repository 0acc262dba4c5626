"""Sections of a recipe -> the objects they describe."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from abkd import config
from abkd.calibrations import CALIBRATIONS, Calibration, Plain
from abkd.data.images import Augmentation
from abkd.data.rollouts import STRATEGIES, Rollouts
from abkd.divergences import KINDS, AlphaBeta, AlphaBetaSchedule, Divergence, Ramp
from abkd.features import METHODS, FeatureTerm
from abkd.generation import Sampling, generate_ids
from abkd.generation_vllm import VLLM
from abkd.models.adapters import add_lora, merged_weights
from abkd.objective import Objective

SAMPLING = ("max_new_tokens", "temperature", "top_p")
"""Fields of a recipe's section that make a `Sampling`."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def make_objective(section: config.Objective) -> Objective:
    return Objective(make_calibration(section), section.kd_weight, section.ce_weight, section.kd_warmup)


def make_calibration(section: config.Objective) -> Calibration:
    if section.divergence is not None:
        temperatures = section.model_dump(include=set(config.TEMPERATURES))
        return Plain(make_divergence(section.divergence), **temperatures)
    if section.calibration is None:
        return Plain(AlphaBeta())  # kd_weight is 0: it is not computed
    parameters = {name: value for name, value in section.calibration if name != "kind"}
    if "divergence" in parameters:
        parameters["divergence"] = make_divergence(parameters["divergence"])
    return CALIBRATIONS[section.calibration.kind](**parameters)


def make_divergence(section: config.Divergence) -> Divergence | AlphaBetaSchedule:
    parameters = {
        name: Ramp(value.start, value.end, value.shape) if isinstance(value, config.Ramp) else value
        for name, value in section
        if name != "kind"
    }
    if any(isinstance(value, Ramp) for value in parameters.values()):
        return AlphaBetaSchedule(**parameters)
    return KINDS[section.kind](**parameters)


def make_augmentation(section: config.Augmentation) -> Augmentation:
    return Augmentation(**section.model_dump())


def make_terms(section: config.ImageObjective, seed: int) -> list[FeatureTerm]:
    """The terms on features, with the seed of the training."""
    terms = []
    for each in section.features:
        placed = each.model_dump(include={"student_layer", "teacher_layer", "student_side", "teacher_side", "weight"})
        parameters = each.model_dump(exclude={"kind", *placed}) | {"seed": seed}
        method = METHODS[each.kind](**parameters)
        inside = {name: f"network.{placed[name]}" for name in ("student_layer", "teacher_layer")}  # of ImageClassifier
        terms.append(FeatureTerm(method, **placed | inside))
    return terms


def make_rollouts(section: config.Rollouts, generate: Callable[..., list[list[int]]] = generate_ids) -> Rollouts | None:
    """None for fixed data."""
    if section.kind == "fixed":
        return None
    sampling = Sampling(**section.model_dump(include=set(SAMPLING)))
    parameters = section.model_dump(exclude={"kind", "engine", "vllm_memory", *SAMPLING})
    return STRATEGIES[section.kind](sampling, generate=generate, **parameters)


def make_vllm(model: PreTrainedModel, *, max_tokens: int, memory: float, dtype: str, is_fixed: bool = False) -> VLLM:
    """For prompts and completions of `max_tokens` together, or as many as `model` has positions."""
    context = getattr(model.config, "max_position_embeddings", None) or max_tokens
    options: Any = {"dtype": dtype, "memory": memory, "is_fixed": is_fixed, "weights": merged_weights}
    return VLLM(model, max_tokens=min(max_tokens, context), **options)


def freeze(student: PreTrainedModel, section: config.Student) -> None:
    """What the section wants fixed takes no gradient."""
    if section.freeze_embeddings:
        student.get_input_embeddings().requires_grad_(False)
        student.get_output_embeddings().requires_grad_(False)


def with_lora(student: PreTrainedModel, section: config.LoRA | None) -> PreTrainedModel:
    """With the adapter that the section describes, if there is one."""
    return student if section is None else add_lora(student, **section.model_dump(exclude={"merge"}))
