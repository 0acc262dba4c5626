"""The plane of alpha and beta, drawn: settings coloured by how well they did, landmarks, lines of known families."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from abkd.analysis.report.markup import Markup, element
from abkd.analysis.report.svg import LETTER, Scale, axes, drawing

SIZE, LEFT, RIGHT, TOP, BOTTOM = 440.0, 40.0, 12.0, 12.0, 34.0
RADIUS = 7.5
Point = tuple[float, float]
Box = tuple[float, float, float, float]
VIRIDIS = (0x440154, 0x3B528B, 0x21918C, 0x5EC962, 0xFDE725)
"""viridis: its brightness alone tells its order, with any kind of colour vision and in grey."""


class Spot(NamedTuple):
    """A setting."""

    label: str
    first: Point
    """(alpha, beta) at the first step."""
    last: Point
    shade: float | None
    """0 (worst) to 1 (best); None where there is no figure."""


def plane(spots: Sequence[Spot], landmarks: Mapping[str, Point]) -> Markup:
    """Settings at one point stand beside each other. A name that has no room is left out."""
    points = [point for spot in spots for point in (spot.first, spot.last)] + list(landmarks.values())
    x = _scale([point[0] for point in points], LEFT, SIZE - RIGHT)
    y = _scale([point[1] for point in points], SIZE - BOTTOM, TOP)
    places = _places(spots, x, y)
    taken = [_around(across, down) for across, down in places]
    lines, texts = _two_lines(x, y, taken)
    named: list[Any] = [_placed(spot.label, *place, taken, "label") for spot, place in zip(spots, places, strict=True)]
    crosses = []
    for name, (alpha, beta) in landmarks.items():
        across, down = x(alpha), y(beta)
        crosses.append(
            element("path", d=f"M{across - 4:.1f} {down:.1f}h8M{across:.1f} {down - 4:.1f}v8", class_="landmark")
        )
        named.append(_placed(name, across, down, taken, "muted"))
    dots = [_dot(spot, place, x, y) for spot, place in zip(spots, places, strict=True)]
    beta_name = element("text", "β", x=8.0, y=TOP + 4, class_="axis")
    return drawing(
        SIZE, SIZE, "The plane of alpha and beta", axes(x, y, "α"), beta_name, lines, texts, crosses, dots, named
    )


def shade(share: float | None) -> str:
    """A colour for 0 (worst) to 1 (best)."""
    if share is None:
        return "none"
    place = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    index = min(int(place), len(VIRIDIS) - 2)
    pairs = [((VIRIDIS[index] >> bits & 255), (VIRIDIS[index + 1] >> bits & 255)) for bits in (16, 8, 0)]
    return "#" + "".join(f"{round(low + (high - low) * (place - index)):02x}" for low, high in pairs)


def _scale(values: Sequence[float], start: float, stop: float) -> Scale:
    return Scale(min(-0.2, min(values) - 0.15), max(1.3, max(values) + 0.15), start, stop)


def _places(spots: Sequence[Spot], x: Scale, y: Scale) -> list[Point]:
    """Where each spot is drawn: those of one point in a row around it."""
    at_one_point: dict[Point, list[int]] = defaultdict(list)
    for index, spot in enumerate(spots):
        at_one_point[spot.last].append(index)
    places = {}
    for (alpha, beta), members in at_one_point.items():
        for number, index in enumerate(members):
            places[index] = (x(alpha) + (number - (len(members) - 1) / 2) * 2 * RADIUS, y(beta))
    return [places[index] for index in range(len(spots))]


def _two_lines(x: Scale, y: Scale, taken: list[Box]) -> tuple[list[Markup], list[Markup]]:
    """alpha + beta = 1 and alpha = 1 within the axes, and their names."""
    low, high = max(x.low, 1 - y.high), min(x.high, 1 - y.low)
    slanted = f"M{x(low):.1f} {y(1 - low):.1f}L{x(high):.1f} {y(1 - high):.1f}"
    upright = f"M{x(1):.1f} {y.start:.1f}V{y.stop:.1f}"
    names = [("α + β = 1", x(low) + 12, y(1 - low) + 8), ("α = 1", x(1) + 5, y.stop + 8)]
    texts = [element("text", name, x=across, y=down, class_="muted") for name, across, down in names]
    taken += [(across, down - 9, across + len(name) * LETTER, down + 3) for name, across, down in names]
    return [element("path", d=line, class_="guide") for line in (slanted, upright)], texts


def _dot(spot: Spot, place: Point, x: Scale, y: Scale) -> Markup:
    """With a line from where a schedule starts."""
    across, down = place
    start = f"M{x(spot.first[0]):.1f} {y(spot.first[1]):.1f}L{across:.1f} {down:.1f}"
    moved = element("path", d=start, class_="moved") if spot.first != spot.last else None
    title = element("title", spot.label)
    return element(
        "g", moved, element("circle", title, cx=across, cy=down, r=RADIUS, fill=shade(spot.shade), class_="spot")
    )


def _placed(text: str, across: float, down: float, taken: list[Box], class_: str) -> Markup | None:
    """The text at the first side of its point where it covers nothing; None where it always would."""
    width, own = len(text) * LETTER, _around(across, down)
    for dx, dy in ((11, 4), (-11 - width, 4), (-width / 2, -12), (-width / 2, 20), (8, -11), (8, 18), (-8 - width, 18)):
        left, base = across + dx, down + dy
        box = (left, base - 9, left + width, base + 3)
        inside = left >= LEFT and box[2] <= SIZE and box[1] >= 0 and box[3] <= SIZE - BOTTOM
        if inside and not any(_overlap(box, other) for other in taken if other != own):
            taken.append(box)
            return element("text", text, x=left, y=base, class_=class_)
    return None


def _around(across: float, down: float) -> Box:
    return across - RADIUS, down - RADIUS, across + RADIUS, down + RADIUS


def _overlap(box: Box, other: Box) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
