"""HTML and SVG out of Python: text becomes part of an element escaped, and no other way."""

import html
from typing import Any


class Markup(str):
    """Text that is markup already. Every other string is escaped when it becomes part of an element."""


def element(name: str, /, *content: Any, **attributes: Any) -> Markup:
    """<name attribute="value">content</name>

    Args:
        content: markup, text, or sequences of them; None is left out, whatever is neither is written as text.
        attributes: None is left out, True is the bare name. An underscore stands for a hyphen; one at the end, as in
            class_, is dropped.
    """
    pairs = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    return Markup(f"<{name}{pairs}>{''.join(map(_escaped, content))}</{name}>")


def joined(*content: Any) -> Markup:
    """The parts after each other, escaped as in an element."""
    return Markup("".join(map(_escaped, content)))


def _attribute(key: str, value: Any) -> str:
    key = key.rstrip("_").replace("_", "-")
    if isinstance(value, float):
        value = f"{value:.2f}"
    return f" {key}" if value is True else f' {key}="{_text(str(value))}"'


def _escaped(part: Any) -> str:
    if part is None:
        return ""
    if isinstance(part, Markup):
        return part
    return "".join(map(_escaped, part)) if isinstance(part, (list, tuple)) else _text(str(part))


def _text(text: str) -> str:
    """Escaped; what a UTF-8 file or HTML cannot hold becomes U+FFFD."""
    text = "".join("\ufffd" if "\ud800" <= each <= "\udfff" or each == "\0" else each for each in text)
    return html.escape(text)
