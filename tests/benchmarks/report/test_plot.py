"""Plots: axes that do not mislead, labels that do not overlap, colours that can be read."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.report.plot import (
    COLOURS,
    LINE,
    Block,
    Row,
    apart,
    axis,
    fitting,
    key,
    linear,
    logarithmic,
    measured,
    rows,
    ticks,
)
from benchmarks.report.style import DARK, LIGHT

POSITIVE = st.floats(1e-6, 1e12)
ANY = st.one_of(st.just(0.0), st.floats(-1e12, 1e12))


@given(st.lists(ANY, min_size=1))
def test_a_linear_axis_begins_at_0_and_holds_all(values: list[float]) -> None:
    scale = linear(values)
    assert scale.low <= min(0, *values) <= max(0, *values) <= scale.high
    assert min(values) < 0 or scale.low == 0


@given(st.lists(POSITIVE, min_size=1))
def test_ticks_are_few_ascending_and_within(values: list[float]) -> None:
    for scale in (linear(values), logarithmic(values)):
        found = ticks(scale)
        assert 2 <= len(found) <= 7
        assert all(one < two for one, two in pairwise(found))
        assert scale.low <= found[0] * (1 + 1e-9)
        assert found[-1] <= scale.high * (1 + 1e-9)


@given(st.lists(POSITIVE, min_size=2), st.booleans())
def test_places_on_an_axis_are_in_the_order_of_values(values: list[float], log: bool) -> None:
    scale = logarithmic(values) if log else linear(values)
    places = [scale.at(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(0 <= place <= 1 for place in places)


def test_an_axis_is_logarithmic_when_medians_are_far_apart() -> None:
    assert fitting([3, 4, 40, 50], [3, 45]).log
    assert not fitting([3, 4, 10, 50], [3, 20]).log
    assert not fitting([0, 4, 40, 50], [0, 45]).log


def test_measured_values_are_the_ticks() -> None:
    assert [label for _, label in measured("connections", [1, 16, 64, 500]).ticks] == ["1", "16", "64", "500"]
    assert measured("connections", [1, 500]).scale.log
    assert not measured("delay", [0, 10]).scale.log


@given(st.lists(st.floats(0, 300), max_size=12))
def test_labels_stand_apart_and_in_order(wanted: list[float]) -> None:
    places = apart(wanted, 0, 300)
    assert len(places) == len(wanted)
    assert all(0 <= place <= 300 for place in places)
    for one, two in combinations(range(len(wanted)), 2):
        assert abs(places[one] - places[two]) >= LINE - 1e-6
        assert wanted[one] >= wanted[two] or places[one] < places[two]


def test_labels_that_are_close_give_way_to_both_sides() -> None:
    assert apart([100, 100], 0, 300) == [100 - LINE / 2, 100 + LINE / 2]


def test_a_label_with_room_stays_where_its_line_ends() -> None:
    assert apart([10, 100, 200], 0, 300) == [10, 100, 200]


def test_what_is_0_has_no_mark_on_a_logarithmic_axis() -> None:
    def drawn(value: float) -> str:
        row = Row(1, "tcp", value, value, value, "text", "tip")
        return rows("plot", [Block("", [row])], axis("ratio", logarithmic([0.5, 2])))

    assert 'class="mark"' not in drawn(0)
    assert 'class="mark"' in drawn(1)


def test_subjects_differ_in_colour_or_shape() -> None:
    assert len({key(mark) for mark in range(COLOURS * COLOURS)}) == COLOURS * COLOURS
    for one, two in combinations(range(COLOURS), 2):
        assert shape(one) != shape(two)


def shape(mark: int) -> str:
    return key(mark).split(' d="')[1]


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_every_colour_of_text_can_be_read(palette: dict[str, str]) -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1 for text."""
    for name in set(palette) - {"page", "panel", "banner", "rule"}:
        for behind in ("page", "panel"):
            assert contrast(palette[name], palette[behind]) >= 4.5, (name, behind)
    assert contrast(palette["text"], palette["banner"]) >= 4.5


def contrast(one: str, two: str) -> float:
    """WCAG 2.2's contrast ratio."""
    light, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
