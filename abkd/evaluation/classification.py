"""What the logits of a classifier are worth: accuracy, calibration, entropy, closeness to a teacher, confusions."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abkd import ranges, ranks
from abkd.divergences import Divergence
from abkd.errors import InputError

BINS = 15
"""Of the confidence, for the calibration error."""
Z = NormalDist().inv_cdf(0.975)
"""Of the 95 % interval."""


class Confusion(NamedTuple):
    true: str
    predicted: str
    num_images: int
    share: float
    """Of the images of the true class, 0 to 1."""


class ClassAccuracy(NamedTuple):
    name: str
    num_images: int
    accuracy: float | None
    """0 to 1; None where there is no image."""


def measure_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    teacher_logits: Tensor | None = None,
    divergences: Mapping[str, Divergence] | None = None,
    temperature: float = 4.0,
    classes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """`ClassificationMeter.result` of one batch, which is all there is.

    Args:
        logits: `[N, C]`; labels: int64 `[N]`; teacher_logits: `[N, C]`, as in `ClassificationMeter.add`.
        divergences, temperature: as in `ClassificationMeter`.
        classes: the C names; adds the confusions and the accuracy of each class.
    """
    meter = ClassificationMeter(divergences, temperature=temperature)
    meter.add(logits, labels, teacher_logits)
    return meter.result(classes)


class ClassificationMeter:
    """Is fed the logits of a classifier batch by batch and keeps sums and a count of each confusion.

    The prediction is the class with the largest logit, the first of them where several are equal. In general the
    order of an image's classes is by falling logit and, at equal logits, by number; the label is within the top k
    where it is one of the first k. So a classifier that gives the same to all classes is right where the label is 0.

    Args:
        divergences: name -> divergence, taken between the classes' probabilities at temperature 1 of each image; each
            name is a key of the result. Needs a teacher.
        temperature: above 0, at which the entropy is also taken.
    """

    def __init__(self, divergences: Mapping[str, Divergence] | None = None, *, temperature: float = 4.0):
        ranges.temperatures(temperature, None, "none")
        self.divergences, self.temperature = dict(divergences or {}), temperature
        self.num_classes, self.has_teacher = 0, False
        self._sums: dict[str, Tensor] = {}
        self._confusions: Counter[tuple[int, int]] = Counter()

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> None:
        """Takes in N images.

        Args:
            logits: `[N, C]`, computed in fp32 at least; -inf forbids a class.
            labels: int64 `[N]`, 0 to C - 1.
            teacher_logits: `[N, C]`; with every batch or with none.

        Raises:
            InputError: a shape or a label is wrong; an image has NaN, +inf or nothing above -inf among its logits.
        """
        self._check(logits, labels, teacher_logits)
        self.num_classes, self.has_teacher = logits.shape[1], teacher_logits is not None
        logits, labels = logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.to(logits.device)
        q, prediction, place = logits.log_softmax(-1), logits.argmax(-1), _place(logits, labels)
        sums = {
            "num_images": torch.tensor(len(labels)),
            "top1": (place < 1).sum(),
            "top5": (place < 5).sum(),
            "cross_entropy": -q.gather(-1, labels.unsqueeze(-1)).sum(),
            "entropy": _entropy(q).sum(),
            "softened_entropy": _entropy((logits / self.temperature).log_softmax(-1)).sum(),
            "surplus": _surplus(q.amax(-1).exp().cpu().double(), (place < 1).cpu()),
        }
        if teacher_logits is not None:
            teacher_logits = teacher_logits.to(logits)
            p = teacher_logits.log_softmax(-1)
            sums["teacher_top1"] = (_place(teacher_logits, labels) < 1).sum()
            sums["agreement"] = (teacher_logits.argmax(-1) == prediction).sum()
            sums |= {name: each(student=q, teacher=p).sum() for name, each in self.divergences.items()}
        self._sums = _added([self._sums, {name: value.cpu().double() for name, value in sums.items()}])
        self._confusions.update(zip(labels.tolist(), prediction.tolist(), strict=True))

    def result(self, classes: Sequence[str] | None = None) -> dict[str, Any]:
        """Of all images of all ranks, on every rank.

        Args:
            classes: the C names, each at its number.

        Returns:
            `num_images`; `top1`, and with more than 5 classes `top5`, shares from 0 to 1; `top1_interval`, see
            `wilson_interval`; means over the images of `cross_entropy` with the labels, `entropy` and
            `softened_entropy` (at `temperature`, which is there too), nats; `calibration_error`, the mean over 15
            bins of equal width of the confidence, weighted by their images, of |accuracy - mean confidence|.
            With a teacher `teacher_top1`, `agreement` (share of images with one prediction) and each divergence,
            a mean over the images in nats. With classes `confusions` and `per_class`, see `worst_confusions` and
            `per_class_accuracy`.

        Raises:
            InputError: there is no image; there are not C names.

        Source: calibration error: Guo et al., "On calibration of modern neural networks", ICML 2017, Eq. 3; a bin
            holds its upper end.
        """
        of_all = ranks.gather((self.num_classes, self._sums, self._confusions))
        num_classes = max(each[0] for each in of_all)
        sums, confusions = _added([each[1] for each in of_all]), Counter[tuple[int, int]]()
        for each in of_all:
            confusions.update(each[2])
        if not sums or sums["num_images"] == 0:
            raise InputError("there is no image to measure; give at least one")
        if num_classes <= 5:
            del sums["top5"]
        num_images, num_right = int(sums.pop("num_images")), int(sums["top1"])
        surplus = sums.pop("surplus")
        result: dict[str, Any] = {"num_images": num_images}
        result |= {name: total.item() / num_images for name, total in sums.items()}
        result["top1_interval"] = wilson_interval(num_right, num_images)
        result["temperature"] = self.temperature
        result["calibration_error"] = surplus.abs().sum().item() / num_images
        if classes is not None:
            _check_classes(classes, num_classes)
            result |= {"confusions": _worst(confusions, classes, 10), "per_class": _per_class(confusions, classes)}
        return result

    def _check(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> None:
        if logits.dim() != 2 or (self.num_classes or logits.shape[1]) != logits.shape[1] or logits.shape[1] == 0:
            wanted = self.num_classes or "C"
            raise InputError(f"logits must be [N, {wanted}], got {list(logits.shape)}")
        if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
            raise InputError(f"labels must be int64 [{len(logits)}], got {labels.dtype} {list(labels.shape)}")
        if teacher_logits is not None and teacher_logits.shape != logits.shape:
            raise InputError(f"teacher_logits must be {list(logits.shape)}, got {list(teacher_logits.shape)}")
        if self.num_classes and self.has_teacher != (teacher_logits is not None):
            raise InputError("teacher_logits must come with every batch, or with none")
        if self.divergences and teacher_logits is None:
            raise InputError("divergences need teacher_logits, which are None; give them, or no divergences")
        if len(labels) and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
            low, high = int(labels.min()), int(labels.max())
            raise InputError(f"labels must lie between 0 and {logits.shape[1] - 1}, got {low} to {high}")
        for name, rows in (("logits", logits), ("teacher_logits", teacher_logits)):
            if rows is not None and len(rows) and not (largest := rows.amax(-1)).isfinite().all():
                number = int((~largest.isfinite()).sum())
                raise InputError(
                    f"{name} hold NaN, +inf or -inf alone in {number} of {len(rows)} images; the model has diverged, "
                    "or overflows in its dtype: measure it in float32"
                )


def worst_confusions(logits: Tensor, labels: Tensor, classes: Sequence[str], num: int = 10) -> list[Confusion]:
    """The `num` most frequent pairs of a true class and another, predicted one; equal ones by number of the classes.

    Args and errors as `measure_logits`; there may be fewer pairs.
    """
    return _worst(_confusions(logits, labels, classes), classes, num)


def per_class_accuracy(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> list[ClassAccuracy]:
    """The share of each class's images that are predicted as it, in the order of `classes`.

    Args and errors as `measure_logits`. Weighted by the images the mean is top1.
    """
    return _per_class(_confusions(logits, labels, classes), classes)


def wilson_interval(num_right: int, num_images: int) -> list[float]:
    """(p + z^2/2n -+ z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n), p = num_right / n, z = 1.96: 95 % for the share.

    Args:
        num_right, num_images: 0 <= num_right <= num_images = n, n >= 1.

    Returns:
        [low, high], from 0 to 1: where the share of all images of the kind may lie. It says nothing of what another
        training would give.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    share, z_2 = num_right / num_images, Z * Z / num_images
    half = math.sqrt(share * (1 - share) * z_2 + z_2 * z_2 / 4)
    low, high = ((share + z_2 / 2 + side * half) / (1 + z_2) for side in (-1, 1))
    return [0.0 if num_right == 0 else low, 1.0 if num_right == num_images else high]  # exact there, but for rounding


def harmonic_mean(base: float, new: float) -> float:
    """2 base new / (base + new), of two accuracies >= 0 in one unit; 0 where both are."""
    for name, value in (("base", base), ("new", new)):
        if ranges.finite(name, value) < 0:
            raise InputError(f"{name} must be >= 0, got {value!r}")
    return 2 * base * new / (base + new) if base + new > 0 else 0.0


def base_to_new(accuracies: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Means over data sets of (accuracy on base classes, on new classes), in the unit they come in.

    Returns:
        `mean_base`, `mean_new`, and two numbers that are both called the harmonic mean of a table:
        `mean_of_harmonic_means`, of the sets' own, as ABKD's average row prints for its losses;
        `harmonic_mean_of_means`, of mean_base and mean_new, as the same row prints for CLIP.
    """
    if not accuracies:
        raise InputError("there is no data set to average; give at least one")
    base, new = (fmean(column) for column in zip(*accuracies.values(), strict=True))
    return {
        "mean_base": base,
        "mean_new": new,
        "mean_of_harmonic_means": fmean(harmonic_mean(*pair) for pair in accuracies.values()),
        "harmonic_mean_of_means": harmonic_mean(base, new),
    }


def _place(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the label: with larger logits, or equal ones and smaller numbers."""
    of_label, number = logits.gather(-1, labels.unsqueeze(-1)), torch.arange(logits.shape[-1], device=logits.device)
    return ((logits > of_label) | ((logits == of_label) & (number < labels.unsqueeze(-1)))).sum(-1)


def _entropy(log_probabilities: Tensor) -> Tensor:
    return torch.special.entr(log_probabilities.exp()).sum(-1)


def _surplus(confidence: Tensor, right: Tensor) -> Tensor:
    """Of each bin (k/15, (k + 1)/15] of the confidence: confidence less 1 where right, summed."""
    place = (confidence * BINS).ceil().long() - 1
    return confidence.new_zeros(BINS).index_add(0, place, confidence - right.to(confidence))


def _added(several: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for sums in several:
        total |= {name: total[name] + value if name in total else value for name, value in sums.items()}
    return total


def _confusions(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> Counter[tuple[int, int]]:
    meter = ClassificationMeter()
    meter.add(logits, labels)
    _check_classes(classes, meter.num_classes)
    return meter._confusions


def _check_classes(classes: Sequence[str], num_classes: int) -> None:
    if len(classes) != num_classes:
        raise InputError(f"classes must be the {num_classes} names, got {len(classes)}")


def _worst(confusions: Counter[tuple[int, int]], classes: Sequence[str], num: int) -> list[Confusion]:
    wrong = sorted((-count, pair) for pair, count in confusions.items() if pair[0] != pair[1])[:num]
    sizes = _sizes(confusions)
    return [Confusion(classes[i], classes[j], -count, -count / sizes[i]) for count, (i, j) in wrong]


def _per_class(confusions: Counter[tuple[int, int]], classes: Sequence[str]) -> list[ClassAccuracy]:
    sizes = _sizes(confusions)
    return [
        ClassAccuracy(name, sizes[i], confusions[i, i] / sizes[i] if sizes[i] else None)
        for i, name in enumerate(classes)
    ]


def _sizes(confusions: Counter[tuple[int, int]]) -> Counter[int]:
    """Images of each true class."""
    sizes = Counter[int]()
    for (true, _), count in confusions.items():
        sizes[true] += count
    return sizes
