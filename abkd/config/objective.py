"""Divergences, calibrations and the objective that weighs them."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from abkd import ranges
from abkd.config.fields import NonNegative, Positive, Real, Section


class Ramp(Section):
    """An exponent that moves during training."""

    start: Real = Field(alias="from")
    """At the first step."""
    end: Real = Field(alias="to")
    """At the last step."""
    shape: Literal["constant", "linear", "cosine"] = "linear"
    """constant stays at `from`."""


Exponent = Annotated[
    Annotated[Real, Tag("number")] | Annotated[Ramp, Tag("ramp")],
    Discriminator(lambda value: "ramp" if isinstance(value, (dict, Ramp)) else "number"),
]


class AlphaBeta(Section):
    kind: Literal["alpha_beta"]
    alpha: Exponent = 0.2
    """Hardness-concentration: smaller chases large errors harder. Any finite number; 0 to 1 is the useful range.
    Or {from, to, shape}: moves over the training."""
    beta: Exponent = 0.7
    """Confidence-concentration: larger trusts the student's confidence more. Any finite number; 0 to 1 is useful.
    Or {from, to, shape}."""


class _InRange(Section):
    """A divergence whose parameters `ranges` checks."""

    @model_validator(mode="after")
    def _in_range(self):
        parameters = self.model_dump()
        ranges.check(parameters.pop("kind"), **parameters)
        return self


class ForwardKL(Section):
    kind: Literal["forward_kl"]


class ReverseKL(Section):
    kind: Literal["reverse_kl"]


class SymmetricKL(Section):
    kind: Literal["symmetric_kl"]


class JSD(_InRange):
    kind: Literal["jsd"]
    mix: Real = 0.5
    """The teacher's share of the mixture, between 0 and 1; the beta of GKD and TRL."""


class SkewedForwardKL(_InRange):
    kind: Literal["skewed_forward_kl"]
    mix: Real = 0.1
    """The teacher's share of the mixture, between 0 and 1; DistiLLM's lambda."""


class SkewedReverseKL(_InRange):
    kind: Literal["skewed_reverse_kl"]
    mix: Real = 0.9
    """The teacher's share of the mixture, between 0 and 1; 1 - DistiLLM's lambda."""


class TotalVariation(Section):
    kind: Literal["total_variation"]


class WSD(_InRange):
    kind: Literal["wsd"]
    forward_weight: Real = 0.5
    reverse_weight: Real = 0.5


class AKL(_InRange):
    kind: Literal["akl"]
    head_mass: Real = 0.5
    """The teacher's mass that makes the head, between 0 and 1."""


class BDKD(_InRange):
    kind: Literal["bdkd"]
    gain: Real = 2.0
    """On forward KL where the teacher has more entropy, on reverse KL where the student has; above 1."""


class AlphaNet(_InRange):
    kind: Literal["alphanet"]
    alpha_low: Real = -1.0
    alpha_high: Real = 1.0


class AlphaMixture(_InRange):
    kind: Literal["alpha_mixture"]
    alpha: Real = 0.2
    beta: Real = 0.7
    mix: Real = 0.1
    """The teacher's share of the assistant, between 0 and 1; AMiD's lambda."""
    order: Real = -1.0
    """AMiD's alpha: -1 is the arithmetic mixture, 1 the geometric one."""


Divergence = Annotated[
    AlphaBeta
    | ForwardKL
    | ReverseKL
    | SymmetricKL
    | JSD
    | SkewedForwardKL
    | SkewedReverseKL
    | TotalVariation
    | WSD
    | AKL
    | BDKD
    | AlphaNet
    | AlphaMixture,
    Field(discriminator="kind"),
]


class _Tempered(Section):
    """A calibration with one temperature."""

    temperature: Positive
    temperature_gradient_scale: Literal["none", "squared"] = "squared"

    @model_validator(mode="after")
    def _in_bounds(self):
        ranges.temperatures(self.temperature, None, self.temperature_gradient_scale)
        return self


class DKD(_Tempered):
    """Target and non-target classes apart. The divergence is that of the non-target ones."""

    kind: Literal["dkd"]
    divergence: Divergence = ForwardKL(kind="forward_kl")
    target_weight: NonNegative = 1.0
    nontarget_weight: NonNegative = 8.0
    temperature: Positive = 4.0

    @model_validator(mode="after")
    def _a_weight(self):
        ranges.weights(target_weight=self.target_weight, nontarget_weight=self.nontarget_weight)
        return self


class LSD(_Tempered):
    """Standardised logits."""

    kind: Literal["lsd"]
    divergence: Divergence = ForwardKL(kind="forward_kl")
    temperature: Positive = 2.0


class TTM(Section):
    """A teacher raised to a power against the student as it is."""

    kind: Literal["ttm"]
    divergence: Divergence = ForwardKL(kind="forward_kl")
    exponent: Positive = 0.1
    """Of the teacher's probabilities, 1/T of its temperature."""

    @model_validator(mode="after")
    def _in_bounds(self):
        ranges.exponent(self.exponent)
        return self


class WTTM(TTM):
    """ttm with each sample weighted by its power sum."""

    kind: Literal["wttm"]  # type: ignore[assignment]


class DIST(_Tempered):
    """Pearson correlations, over a sample's classes and over the batch. Has no divergence."""

    kind: Literal["dist"]
    inter_weight: NonNegative = 1.0
    intra_weight: NonNegative = 1.0
    temperature: Positive = 4.0

    @model_validator(mode="after")
    def _a_weight(self):
        ranges.weights(inter_weight=self.inter_weight, intra_weight=self.intra_weight)
        return self


class MLKD(Section):
    """Several temperatures, and the products between samples and between classes."""

    kind: Literal["mlkd"]
    divergence: Divergence = ForwardKL(kind="forward_kl")
    temperatures: Annotated[tuple[Positive, ...], Field(min_length=1)] = (2.0, 3.0, 4.0, 5.0, 6.0)

    @model_validator(mode="after")
    def _in_bounds(self):
        ranges.several_temperatures(self.temperatures)
        return self


Calibration = Annotated[DKD | LSD | TTM | WTTM | DIST | MLKD, Field(discriminator="kind")]


class Objective(Section):
    divergence: Divergence | None = None
    """Of the teacher's row from the student's. Either this or calibration; neither where kd_weight is 0."""
    temperature: Positive = 1.0
    """Divides the logits of both before the divergence."""
    teacher_temperature: Positive | None = None
    """Of the teacher's logits, where it is another one; then temperature is the student's alone."""
    temperature_gradient_scale: Literal["none", "squared"] = "none"
    """squared multiplies the divergence by temperature squared, as torchdistill, timm and ModelOpt do."""
    calibration: Calibration | None = None
    """Another way to compare the logits; it holds its own divergence and temperature."""
    kd_weight: NonNegative = 1.0
    """Of the divergence from the teacher."""
    ce_weight: NonNegative = 0.0
    """Of the cross-entropy with the data."""
    kd_warmup: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the training over which kd_weight rises linearly from 0; DKD's recipe has 20 of 240 epochs."""

    @model_validator(mode="after")
    def _one_comparison(self):
        needs_none = self.kd_weight == 0 and self.divergence is None and self.calibration is None
        if not needs_none and (self.divergence is None) == (self.calibration is None):
            found = "neither is set" if self.divergence is None else "both are; drop one with objective.divergence=null"
            raise ValueError(f"set exactly one of divergence and calibration, {found}")
        if self.calibration is not None:
            for name in TEMPERATURES:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} belongs to objective.divergence; the calibration has its own: "
                        f"see objective.calibration"
                    )
        return self

    @model_validator(mode="after")
    def _something_to_learn(self):
        ranges.loss_weights(self.kd_weight, self.ce_weight)
        ranges.warmup(self.kd_warmup, self.kd_weight, self.ce_weight)
        return self

    @model_validator(mode="after")
    def _one_temperature_to_square(self):
        ranges.temperatures(self.temperature, self.teacher_temperature, self.temperature_gradient_scale)
        return self


TEMPERATURES = ("temperature", "teacher_temperature", "temperature_gradient_scale")
"""Of the objective's divergence."""
