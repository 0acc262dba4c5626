"""What the parameters of divergences and calibrations may be. No torch: recipes are checked here too."""

import math
import numbers
from collections.abc import Callable, Sequence

from abkd.errors import InputError

MIX_ENDS = {
    "jsd": (
        "0 whatever the student, and divided by mix it is forward_kl",
        "0, and divided by 1 - mix it is reverse_kl",
    ),
    "skewed_forward_kl": ("forward_kl", "0 whatever the student"),
    "skewed_reverse_kl": ("0 whatever the student", "reverse_kl"),
    "alpha_mixture": ("alpha_beta", "0 whatever the student"),
}
"""kind -> what it is at mix=0 and at mix=1."""


def finite(name: str, value: float) -> float:
    """`value` as a float, where it is a finite number."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or abs(value) > 1e300 or not math.isfinite(value):
        raise InputError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def mixture(kind: str, mix: float) -> float:
    """`mix`, where it lies between 0 and 1, both excluded: the ends have names of their own."""
    if not 0 < finite("mix", mix) < 1:
        at_zero, at_one = MIX_ENDS[kind]
        raise InputError(
            f"mix must lie between 0 and 1, both excluded, got {mix!r}; mix=0 is {at_zero}; mix=1 is {at_one}"
        )
    return float(mix)


def _weights(forward_weight: float, reverse_weight: float) -> None:
    for name, value, other in (
        ("forward_weight", forward_weight, "reverse_kl"),
        ("reverse_weight", reverse_weight, "forward_kl"),
    ):
        if finite(name, value) <= 0:
            raise InputError(f"{name} must be above 0, got {value!r}; {name}=0 is {other} times the other weight")


def _head_mass(head_mass: float) -> None:
    if not 0 < finite("head_mass", head_mass) < 1:
        raise InputError(
            f"head_mass must lie between 0 and 1, both excluded, got {head_mass!r}; "
            "all classes in the head is forward_kl, all in the tail reverse_kl"
        )


def _gain(gain: float) -> None:
    if finite("gain", gain) <= 1:
        raise InputError(f"gain must be above 1, got {gain!r}; gain=1 is symmetric_kl")


def _two_alphas(alpha_low: float, alpha_high: float) -> None:
    if not finite("alpha_low", alpha_low) < finite("alpha_high", alpha_high):
        raise InputError(
            f"alpha_low must be below alpha_high, got {alpha_low!r} and {alpha_high!r}; one alpha alone is "
            "alpha_beta with beta = 1 - alpha"
        )


def _all_finite(**parameters: float) -> None:
    for name, value in parameters.items():
        finite(name, value)


def _alpha_mixture(mix: float, **others: float) -> None:
    mixture("alpha_mixture", mix)
    _all_finite(**others)


_CHECKS: dict[str, Callable[..., object]] = {
    "alpha_beta": _all_finite,
    "jsd": lambda mix: mixture("jsd", mix),
    "skewed_forward_kl": lambda mix: mixture("skewed_forward_kl", mix),
    "skewed_reverse_kl": lambda mix: mixture("skewed_reverse_kl", mix),
    "alpha_mixture": _alpha_mixture,
    "wsd": _weights,
    "akl": _head_mass,
    "bdkd": _gain,
    "alphanet": _two_alphas,
}


def check(kind: str, **parameters: float) -> None:
    """Refuses what a divergence of this kind cannot take. Raises InputError, which names the way out."""
    if parameters:
        _CHECKS[kind](**parameters)


def _bounded(name: str, value: float) -> float:
    """`value` as a float, where its square and its logits' quotient are ordinary numbers in fp32."""
    if not 1e-6 <= finite(name, value) <= 1e6:
        raise InputError(f"{name} must be above 0, between 1e-6 and 1e6, got {value!r}")
    return float(value)


def exponent(value: float) -> float:
    """Of a transformed teacher, 1/T."""
    return _bounded("exponent", value)


def temperatures(temperature: float, teacher_temperature: float | None, gradient_scale: str) -> None:
    """Both above 0; their square is one factor only where they are one value."""
    _bounded("temperature", temperature)
    if teacher_temperature is not None:
        _bounded("teacher_temperature", teacher_temperature)
    if gradient_scale not in ("none", "squared"):
        raise InputError(f"temperature_gradient_scale must be none or squared, got {gradient_scale!r}")
    if gradient_scale == "squared" and teacher_temperature not in (None, temperature):
        raise InputError(
            f"temperature_gradient_scale=squared needs one temperature, got {temperature!r} and "
            f"teacher_temperature={teacher_temperature!r}; use none, and kd_weight for a factor of your own"
        )


def several_temperatures(temperatures: Sequence[float]) -> tuple[float, ...]:
    """All above 0, at least one."""
    if not isinstance(temperatures, (list, tuple)) or len(temperatures) == 0:
        raise InputError(f"temperatures must be a list of at least one number above 0, got {temperatures!r}")
    return tuple(_bounded("temperatures", temperature) for temperature in temperatures)


def weights(**values: float) -> None:
    """Two weights >= 0, not both 0."""
    for name, value in values.items():
        if finite(name, value) < 0:
            raise InputError(f"{name} must be >= 0, got {value!r}")
    if not any(values.values()):
        raise InputError(f"{' and '.join(values)} are both 0: nothing to learn; set one above 0")


def loss_weights(kd_weight: float, ce_weight: float) -> None:
    """Both finite and >= 0 in fp32, not both 0."""
    for name, value in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if not 0 <= finite(name, value) <= 1e30:
            raise InputError(f"{name} must lie between 0 and 1e30, got {value!r}")
    if kd_weight == ce_weight == 0:
        raise InputError("kd_weight and ce_weight are both 0: nothing to learn; set one above 0")


def warmup(kd_warmup: float, kd_weight: float, ce_weight: float) -> None:
    """A share of the training, for one term against another."""
    if not 0 <= finite("kd_warmup", kd_warmup) <= 1:
        raise InputError(f"kd_warmup is a share of the training, between 0 and 1, got {kd_warmup!r}")
    if kd_warmup > 0 and 0 in (kd_weight, ce_weight):
        zero = "ce_weight" if ce_weight == 0 else "kd_weight"
        raise InputError(
            f"kd_warmup={kd_warmup!r} raises kd_weight against ce_weight, and {zero} is 0; "
            f"set {zero} above 0, or warm the learning rate up instead"
        )
