"""Plots as inline SVG, drawn here because packaged ones do not fit one file that is read in any light, on any screen.

matplotlib is 30 MB, and its pictures know neither a dark page nor a phone; plotly puts 4 MB of script into every
report. What a report needs is points, lines, intervals and two kinds of axis. Colours are variables of the page's
style sheet, so a plot follows the reader's light or dark; WIDTH is a phone's, and a wide page puts several side by
side, so no text is ever scaled down to where it cannot be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from benchmarks.report.markup import Html, tag
from benchmarks.report.wording import short

WIDTH: Final = 400
COLOURS: Final = 8
LETTER: Final = 6.6
"""A letter of the plots' text, roughly."""
LINE: Final = 13
"""Between two labels, at least."""
LOG_FROM: Final = 10.0
"""Times. Values further apart need a logarithmic axis: on a linear one the small ones cannot be told apart."""
LEFT, TOP, HEIGHT, FOOT = 48, 24, 320, 40
VALUE, ROW, HEAD = 66, 19, 22


@dataclass(frozen=True, slots=True)
class Scale:
    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value stands, 0 to 1; what lies outside stands at the end."""
        if not self.log:
            share = (value - self.low) / (self.high - self.low)
        elif value <= self.low:
            share = 0.0
        else:
            low = math.log(self.low)
            share = (math.log(value) - low) / (math.log(self.high) - low)
        return min(max(share, 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class Axis:
    title: str
    scale: Scale
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True, slots=True)
class Dot:
    x: float
    y: float
    tip: str
    counts: bool = True
    """Else it is drawn hollow."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A subject in a chart: every round as a small dot, its medians as marks on a line, or a line alone."""

    mark: int
    label: str
    points: Sequence[Dot] = ()
    rounds: Sequence[Dot] = ()
    line: Sequence[tuple[float, float]] = ()
    band: Sequence[tuple[float, float, float]] = ()
    """x, and the least and the most of all rounds there."""


@dataclass(frozen=True, slots=True)
class Row:
    """A subject in a plot of rows: a mark, an interval or range, and every round."""

    mark: int
    label: str
    value: float
    low: float
    high: float
    text: str
    tip: str
    rounds: Sequence[Dot] = ()
    """Each with its value as `x`."""


@dataclass(frozen=True, slots=True)
class Block:
    title: str
    rows: Sequence[Row] = field(default_factory=list)


def linear(values: Iterable[float]) -> Scale:
    """From 0, so that lengths are in proportion."""
    found = list(values)
    low, high = min(0.0, *found), max(0.0, *found)
    room = (high - low) * 0.06
    if room < 1e-12:
        return Scale(low, low + 1)
    return Scale(low - room if low < 0 else 0.0, high + room if high > 0 else 0.0)


def logarithmic(values: Iterable[float]) -> Scale:
    """Of positive values."""
    found = list(values)
    return Scale(min(found) / 1.15, max(found) * 1.15, log=True)


def fitting(values: Iterable[float], medians: Iterable[float]) -> Scale:
    """For all values; logarithmic when the medians are that far apart."""
    found, middles = list(values), list(medians)
    far = min(found, default=0) > 0 and max(middles, default=0) >= LOG_FROM * min(middles, default=1)
    return logarithmic(found) if far else linear(found)


def ticks(scale: Scale, most: int = 6) -> list[float]:
    """Round numbers within a scale, at most so many."""
    if not scale.log:
        return _steps(scale.low, scale.high, most)
    first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    step = max(1, math.ceil((last - first) / most))
    decades = [10.0**power for power in range(first - first % step, last + 1, step) if power > -308]
    best: list[float] = []
    for within in ([1], [1, 2, 5], [1, 1.5, 2, 3, 5, 7], [1, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 7, 8, 9]):
        found = [times * decade for decade in decades for times in within]
        found = [value for value in found if scale.low <= value <= scale.high]
        if len(found) > most:
            break
        best = found
        if len(best) >= 3:
            return best
    return best if len(best) == 2 else _steps(scale.low, scale.high, most)


def axis(title: str, scale: Scale, wording: Callable[[float], str] = short, most: int = 6) -> Axis:
    return Axis(title + (", log scale" if scale.log else ""), scale, [(v, wording(v)) for v in ticks(scale, most)])


def measured(title: str, values: Iterable[float]) -> Axis:
    """An axis whose ticks are the values that were measured."""
    found = sorted(set(values))
    far = found[0] > 0 and found[-1] >= 8 * found[0]
    room = (found[-1] - found[0]) * 0.08
    scale = Scale(found[0] / 1.3, found[-1] * 1.3, log=True) if far else Scale(found[0] - room, found[-1] + room)
    return Axis(title + (", log scale" if far else ""), scale, [(value, short(value)) for value in found])


def chart(title: str, curves: Sequence[Curve], x: Axis, y: Axis) -> Html:
    """Subjects as curves, each labelled at its end."""
    labels = max((len(curve.label) for curve in curves), default=0)
    right = WIDTH - min(120, labels * LETTER + 18)
    bottom = HEIGHT - FOOT

    def across(value: float) -> float:
        return LEFT + x.scale.at(value) * (right - LEFT)

    def up(value: float) -> float:
        return bottom - y.scale.at(value) * (bottom - TOP)

    parts = [_text(y.title, 0, 11, class_="axis")]
    for value, label in y.ticks:
        parts.append(_line(LEFT, up(value), right, up(value), "grid"))
        parts.append(_text(label, LEFT - 5, up(value) + 4, text_anchor="end"))
    parts.append(_line(LEFT, bottom, right, bottom, "base"))
    taken = -math.inf
    for value, label in x.ticks:
        if across(value) - len(label) * LETTER / 2 < taken:
            continue
        taken = across(value) + len(label) * LETTER / 2 + 4
        parts.append(_line(across(value), bottom, across(value), bottom + 4, "base"))
        parts.append(_text(label, across(value), bottom + 16, text_anchor="middle"))
    parts.append(_text(x.title, (LEFT + right) / 2, HEIGHT - 5, class_="axis", text_anchor="middle"))

    ends: list[tuple[float, float]] = []
    for place, curve in enumerate(curves):
        aside = 4 * (place - (len(curves) - 1) / 2) if curve.rounds else 0.0
        line = [(across(px) + aside, up(py)) for px, py in curve.line or [(one.x, one.y) for one in curve.points]]
        shapes = []
        if curve.band:
            outline = [(across(px), up(low)) for px, low, _ in curve.band]
            outline += [(across(px), up(high)) for px, _, high in reversed(curve.band)]
            shapes.append(tag("path", d=_path(outline) + "Z", class_="band"))
        shapes.append(tag("path", d=_path(line), class_="line"))
        shapes += [_round(across(one.x) + aside, up(one.y), one) for one in curve.rounds]
        shapes += [_mark(curve.mark, across(one.x) + aside, up(one.y), one.tip) for one in curve.points]
        if curve.line:
            shapes.append(_mark(curve.mark, *line[-1], curve.label))
        parts.append(_subject(curve.mark, shapes))
        ends.append(line[-1])
    for curve, (px, py), place_y in zip(curves, ends, apart([py for _, py in ends], TOP, bottom), strict=True):
        label = _text(shortened(curve.label, 17), right + 12, place_y + 4, class_="name")
        leader = _line(px + 7, py, right + 9, place_y, "leader") if abs(py - place_y) > 3 or right - px > 20 else Html()
        parts.append(_subject(curve.mark, [leader, label]))
    return _svg(title, HEIGHT, parts)


def rows(
    title: str, blocks: Sequence[Block], x: Axis, *, at: float | None = None, ends: tuple[str, str] = ("", "")
) -> Html:
    """Subjects as rows, each with its value as text; a logarithmic axis has no place for 0.

    `at` draws a line through all rows, `ends` says what its sides mean.
    """
    letters = max((len(row.label) for block in blocks for row in block.rows), default=0)
    left, right = 14 + min(letters, 17) * LETTER, WIDTH - VALUE
    top = HEAD if any(ends) else 4
    parts, y = list[Html](), float(top)

    def across(value: float) -> float:
        return left + x.scale.at(value) * (right - left)

    below = top + sum((HEAD if block.title else 0) + ROW * len(block.rows) for block in blocks) + 4
    for value, label in x.ticks:
        parts.append(_line(across(value), top, across(value), below, "grid"))
        parts.append(_text(label, across(value), below + 13, text_anchor="middle"))
    if at is not None:
        parts.append(_line(across(at), top, across(at), below, "one"))
        parts.append(_text(ends[0], across(at) - 6, 11, class_="axis", text_anchor="end"))
        parts.append(_text(ends[1], across(at) + 6, 11, class_="axis"))
    parts.append(_text(x.title, (left + right) / 2, below + 30, class_="axis", text_anchor="middle"))
    for block in blocks:
        if block.title:
            y += HEAD
            parts.append(_text(shortened(block.title, 56), 0, y - 6, class_="head"))
        for row in block.rows:
            middle = y + ROW / 2
            shapes = [_text(shortened(row.label, 17), left - 10, middle + 4, class_="name", text_anchor="end")]
            if row.high > 0 or not x.scale.log:
                extent = "extent" if row.rounds else "range"
                shapes.append(_line(across(row.low), middle, across(row.high), middle, extent))
            shapes += [_round(across(one.x), middle, one) for one in row.rounds]
            if row.value > 0 or not x.scale.log:
                shapes.append(_mark(row.mark, across(row.value), middle, row.tip))
            parts.append(_subject(row.mark, shapes))
            parts.append(_text(row.text, WIDTH, middle + 4, text_anchor="end", class_="value"))
            y += ROW
    return _svg(title, below + 36, parts)


def strip(title: str, row: Row, scale: Scale, at: float, colour: str, width: float = 150) -> Html:
    """One interval in a table's cell, beside the line that it should not cross."""

    def across(value: float) -> float:
        return 6 + scale.at(value) * (width - 12)

    parts = [
        _line(across(at), 0, across(at), 20, "one"),
        tag(
            "g",
            _line(across(row.low), 10, across(row.high), 10, "range"),
            _mark(row.mark, across(row.value), 10, row.tip),
            class_=f"subject {colour}",
        ),
    ]
    return _svg(title, 20, parts, width)


def key(mark: int) -> Html:
    """A subject's mark, for text."""
    return tag("svg", _subject(mark, [_mark(mark, 7, 7, "")]), viewBox="0 0 14 14", class_="key", aria_hidden="true")


def apart(wanted: Sequence[float], low: float, high: float) -> list[float]:
    """Places for labels: as wanted, in the same order, but LINE apart, and within bounds while there is room."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    places = [wanted[index] for index in order]
    for _ in range(len(places)):
        for one, two in pairwise(range(len(places))):
            close = LINE - (places[two] - places[one])
            if close > 0:
                places[one] -= close / 2
                places[two] += close / 2
    floor = low
    for index, place in enumerate(places):
        places[index] = max(place, floor)
        floor = places[index] + LINE
    ceiling = max(high, low + LINE * (len(places) - 1))
    for index in reversed(range(len(places))):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - LINE
    return [place for _, place in sorted(zip(order, places, strict=True))]


def shortened(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _steps(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if m * power >= rough)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _svg(title: str, height: float, parts: Sequence[Html], width: float = WIDTH) -> Html:
    return tag("svg", tag("title", title), *parts, viewBox=f"0 0 {width:g} {height:g}", role="img")


def _subject(mark: int, parts: Sequence[Html]) -> Html:
    return tag("g", *parts, class_=f"subject c{mark % COLOURS}")


def _text(content: str, x: float, y: float, **attributes: str) -> Html:
    return tag("text", content, x=x, y=y, **attributes) if content else Html()


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def _round(x: float, y: float, one: Dot) -> Html:
    return tag("circle", tag("title", one.tip), cx=x, cy=y, r=2.2, class_="round" if one.counts else "round hollow")


def _mark(mark: int, x: float, y: float, tip: str) -> Html:
    """A shape of the subject's own: with eight colours and eight shapes, 64 subjects are told apart."""
    shape = _SHAPES[(mark + mark // COLOURS) % len(_SHAPES)]
    title = tag("title", tip) if tip else Html()
    return tag("path", title, d=_path([(x + dx, y + dy) for dx, dy in shape]) + "Z", class_="mark")


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _polygon(corners: int, size: float, turn: float = 0.0) -> list[tuple[float, float]]:
    angles = [2 * math.pi * (index + turn) / corners for index in range(corners)]
    return [(size * math.sin(angle), -size * math.cos(angle)) for angle in angles]


def _star(points: int, size: float, inner: float) -> list[tuple[float, float]]:
    angles = [math.pi * index / points for index in range(2 * points)]
    sizes = [size if index % 2 == 0 else inner for index in range(2 * points)]
    return [(r * math.sin(angle), -r * math.cos(angle)) for r, angle in zip(sizes, angles, strict=True)]


_CROSS: Final = [
    (-2, -5),
    (2, -5),
    (2, -2),
    (5, -2),
    (5, 2),
    (2, 2),
    (2, 5),
    (-2, 5),
    (-2, 2),
    (-5, 2),
    (-5, -2),
    (-2, -2),
]
_SHAPES: Final[Sequence[Sequence[tuple[float, float]]]] = (
    _polygon(24, 4.6),
    _polygon(4, 5.6, 0.5),
    _polygon(3, 6.2),
    _polygon(4, 6),
    _polygon(3, 6.2, 0.5),
    _CROSS,
    _star(5, 6.5, 2.8),
    _polygon(6, 5.4),
)
