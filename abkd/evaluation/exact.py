"""Exact match of final answers, for mathematics."""

import re
from fractions import Fraction

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d[\d,]*)?")


def final_answer(text: str) -> str:
    r"""What a solution ends with: the last `\boxed{...}`, else what follows the last `####`, else the last number.

    Empty where there is none of them.

    Source: `####` is GSM8K's (Cobbe et al., 2021), `\boxed` MATH's (Hendrycks et al., 2021); the last number is the
    usual fallback for models that were told neither.
    """
    if boxed := _last_boxed(text):
        return boxed
    if "####" in text:
        return text.rpartition("####")[2].strip().split("\n")[0].strip()
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else ""


def is_right(prediction: str, reference: str) -> bool:
    """Whether both texts end with the same answer: the same number, or the same characters but for spaces.

    Dollar and per-cent signs, thousands separators, a final full stop, `\\left`, `\\right`, `\\text{}`, `\\!` and `\\,`
    do not count; `\\dfrac` and `\\tfrac` are `\\frac`; `1/2` and `\\frac{1}{2}` are 0.5. No other algebra is done.
    """
    found, wanted = (_normalised(final_answer(text)) for text in (prediction, reference))
    return bool(found) and found == wanted


def _last_boxed(text: str) -> str:
    start = text.rfind("\\boxed{")
    if start < 0:
        return ""
    depth, first = 0, start + len("\\boxed")
    for index in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[first + 1 : index]
    return ""


def _normalised(answer: str) -> str:
    for drop in ("\\left", "\\right", "\\!", "\\,", "$", "\\%", "%"):
        answer = answer.replace(drop, "")
    answer = re.sub(r"\\[dt]frac", r"\\frac", answer)
    answer = re.sub(r"\\text\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"(?<=\d),(?=\d{3})", "", answer)
    answer = re.sub(r"\s+", "", answer).rstrip(".")
    plain = re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", answer)
    try:
        return str(Fraction(plain))
    except (ValueError, ZeroDivisionError):
        return answer
