"""Intervals hold the truth about as often as they say; ratios are of rounds that ran beside each other."""

import math
import random
from dataclasses import replace
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness import statistics
from benchmarks.harness.results import Measure, Ratio, Results, Round, Series
from benchmarks.harness.statistics import RESTARTED, Interval, agree, for_any_run, interval, stretch

POSITIVE = st.floats(1e-3, 1e6)
SCATTER = {
    "log-normal": lambda chance: chance.gauss(0, 1),
    "heavy tails": lambda chance: chance.gauss(0, 1) / math.sqrt(chance.gammavariate(1.5, 2) / 3),  # Student's, of 3
    "a tenth disturbed": lambda chance: chance.gauss(0, 5 if chance.random() < 0.1 else 1),
    "skewed": lambda chance: chance.expovariate(1) - math.log(2),
    "bounded": lambda chance: chance.uniform(-1, 1),
}
HELD = {
    "log-normal": (0.94, 0.96),
    "heavy tails": (0.94, 0.98),
    "a tenth disturbed": (0.94, 0.98),
    "skewed": (0.92, 0.96),
    "bounded": (0.91, 0.95),
}


@pytest.mark.parametrize("rounds", [3, 5, 7, 11])
@pytest.mark.parametrize("scatter", SCATTER)
def test_an_interval_holds_the_truth_about_95_times_in_100(scatter, rounds):
    chance, truth, runs = random.Random(7), 0.75, 4000
    held = 0
    for _ in range(runs):
        found = interval([truth * math.exp(0.1 * SCATTER[scatter](chance)) for _ in range(rounds)])
        held += found.low <= truth <= found.high
    least, most = HELD[scatter]
    assert least <= held / runs <= most


@pytest.mark.parametrize("rounds", [3, 5, 7])
def test_two_runs_of_the_same_disagree_about_once_in_200(rounds):
    chance, runs = random.Random(8), 4000

    def one() -> Ratio:
        found = interval([math.exp(chance.gauss(0, 0.1)) for _ in range(rounds)])
        return Ratio("m", "a", "b", "value", found.median, found.low, found.high, rounds)

    assert 0.001 <= sum(not agree(one(), one()) for _ in range(runs)) / runs <= 0.01


@pytest.mark.parametrize(("rounds", "deviations"), [(3, 2.3), (5, 1.3), (7, 1.1), (11, 0.9)])
def test_few_rounds_cost_width(rounds, deviations):
    chance = random.Random(9)
    widths = [
        math.log(found.high / found.median)
        for found in (interval([math.exp(chance.gauss(0, 1)) for _ in range(rounds)]) for _ in range(2000))
    ]
    assert sum(widths) / len(widths) == pytest.approx(deviations, abs=0.1)


def test_the_plain_bootstrap_of_the_median_would_promise_too_much():
    chance, runs = random.Random(10), 4000
    held = 0
    for _ in range(runs):
        values = [math.exp(chance.gauss(0, 1)) for _ in range(3)]
        held += min(values) <= 1 <= max(values)  # what the percentile bootstrap of three values is
    assert held / runs == pytest.approx(0.75, abs=0.03)
    assert stretch(3) > 1.5


@given(st.lists(POSITIVE, min_size=2, max_size=8), POSITIVE)
def test_an_interval_holds_its_median_and_knows_no_unit_and_no_order(values, factor):
    found = interval(values)
    assert found.low <= found.median <= found.high
    assert found.median == pytest.approx(math.exp(median(map(math.log, values))))
    assert interval(values[::-1]) == found
    scaled = interval([value * factor for value in values])
    assert scaled.median == pytest.approx(found.median * factor)
    assert scaled.high / scaled.median == pytest.approx(found.high / found.median)


@given(st.lists(POSITIVE, min_size=2, max_size=8))
def test_a_ratio_and_its_inverse_say_the_same(values):
    found, inverse = interval(values), interval([1 / value for value in values])
    assert inverse.median == pytest.approx(1 / found.median)
    assert inverse.low == pytest.approx(1 / found.high)
    assert inverse.high == pytest.approx(1 / found.low)


@given(POSITIVE, st.integers(2, 9))
def test_rounds_that_do_not_differ_leave_no_doubt(value, rounds):
    found = interval([value] * rounds)
    assert found.low == found.high == found.median == pytest.approx(value)


@given(st.lists(POSITIVE, min_size=4, max_size=4))
def test_agreement_is_mutual(ends):
    one, other = (
        Ratio("m", "a", "b", "value", low, low, max(low, high), 3)
        for low, high in ((min(ends[:2]), max(ends[:2])), (min(ends[2:]), max(ends[2:])))
    )
    assert agree(one, other) == agree(other, one)
    assert agree(one, one)


def test_intervals_agree_when_they_meet():
    ratio = Ratio("m", "a", "b", "value", 1.0, 0.9, 1.1, 3)
    assert agree(ratio, replace(ratio, low=1.1, median=1.2, high=1.3))
    assert not agree(ratio, replace(ratio, low=1.11, median=1.2, high=1.3))
    assert not agree(replace(ratio, low=1.11, median=1.2, high=1.3), ratio)


def test_what_is_stated_allows_for_another_start():
    exact = for_any_run(Interval(0.5, 0.5, 0.5))
    assert (exact.low, exact.high) == pytest.approx((0.5 / math.exp(RESTARTED), 0.5 * math.exp(RESTARTED)))
    wide = for_any_run(Interval(1.0, 0.5, 2.0))
    assert (wide.low, wide.high) == pytest.approx((0.5, 2.0), rel=0.001)


def run(*series: Series) -> Results:
    return Results(
        "2026-01-01T00:00:00Z",
        quick=True,
        measures=[Measure("m", "paths", "g", "l", "us")],
        series=list(series),
    )


def rounds(*values: float, **details: float) -> list[Round]:
    return [Round(number, value, details) for number, value in enumerate(values, 1)]


BASELINES = {"paths": "theirs"}


def ratios(results: Results, baselines: dict[str, str]) -> list[Ratio]:
    return statistics.ratios(results, baselines)[0]


def late(subject: str, value: float, punctual: float) -> Series:
    """Of a generator whose lateness may have made `value` of something as small as `punctual`."""
    each = [value * (1 + scatter) for scatter in (-0.02, 0, 0, 0, 0.02)]
    return Series("m", subject, rounds(*each, **{"punctual/value": punctual}))


@pytest.mark.parametrize(
    ("ours", "theirs", "stated"),
    [
        ((100, 100), (200, 200), True),
        ((100, 99), (200, 198), True),
        ((100, 80), (200, 200), False),  # with a generator that is in time it might be 0.4
        ((100, 100), (200, 160), False),  # or 0.625
    ],
)
def test_a_ratio_is_withheld_that_lateness_could_move_out_of_its_interval(ours, theirs, stated):
    found, withheld = statistics.ratios(run(late("theirs", *theirs), late("ours", *ours)), BASELINES)
    assert bool(found) is stated
    assert bool(withheld) is not stated
    if withheld:
        assert (withheld[0].subject, withheld[0].baseline, withheld[0].key) == ("ours", "theirs", "value")
        assert "0.40 to 0.50" in withheld[0].reason or "0.50 to 0.62" in withheld[0].reason


def test_a_wide_interval_bears_more_lateness_than_a_narrow_one():
    scattered = Series("m", "ours", rounds(60, 80, 100, 120, 160, **{"punctual/value": 80.0}))
    theirs = Series("m", "theirs", rounds(*[200] * 5, **{"punctual/value": 180.0}))
    assert len(ratios(run(theirs, scattered), BASELINES)) == 1


def test_ratios_are_of_the_same_rounds():
    found = ratios(
        run(Series("m", "theirs", rounds(10, 20, 40)), Series("m", "ours", rounds(5, 10, 20), remark="")), BASELINES
    )
    stated = for_any_run(interval([0.5] * 3))
    assert found == [Ratio("m", "ours", "theirs", "value", 0.5, stated.low, stated.high, 3)]


def test_ratios_are_of_every_key_that_both_have():
    ours = Series("m", "ours", rounds(1, 1, 1, cpu_us=30, p99_us=8, **{"cpu_us/client": 15}))
    theirs = Series("m", "theirs", rounds(2, 2, 2, cpu_us=40, pss_mb=8))
    assert {one.key: one.median for one in ratios(run(ours, theirs), BASELINES)} == pytest.approx(
        {"value": 0.5, "cpu_us": 0.75}
    )


@pytest.mark.parametrize(
    ("operations", "keys"),
    [(999, {"value"}), (1000, {"value", "p99_us"}), (10_000, {"value", "p99_us", "p999_us"})],
)
def test_a_percentile_has_a_ratio_where_ten_operations_of_each_round_were_slower(operations, keys):
    both = [Series("m", name, rounds(1, 1, 1, p99_us=8, p999_us=9, operations=10_000)) for name in ("ours", "theirs")]
    both[0].rounds[1].details["operations"] = operations
    assert {one.key for one in ratios(run(*both), BASELINES)} == keys


@pytest.mark.parametrize(("operations", "stated"), [(999, False), (1000, True)])
def test_a_value_that_is_a_percentile_is_judged_as_one(operations, stated):
    both = [Series("m", name, rounds(8, 8, 8, p99_us=8, operations=1000)) for name in ("ours", "theirs")]
    both[1].rounds[1].details["operations"] = operations
    found, withheld = statistics.ratios(run(*both), BASELINES)
    assert ([one.key for one in found], [one.key for one in withheld]) == (
        (["value", "p99_us"], []) if stated else ([], ["value"])
    )
    assert stated or "999 in a round of theirs, of which 10.0 are slower" in withheld[0].reason


def test_what_was_timed_is_counted_where_nothing_is_divided_by_it():
    """As beside a neighbour, where processor time is not that of the requests alone."""
    both = [Series("m", name, rounds(8, 8, 8, p99_us=8)) for name in ("ours", "theirs")]
    assert ratios(run(*both), BASELINES) == []
    for series in both:
        series.rounds = [replace(one, histogram={8000: 1000}) for one in series.rounds]
    assert {one.key for one in ratios(run(*both), BASELINES)} == {"value", "p99_us"}


def test_a_round_that_the_generator_decided_is_in_no_ratio():
    theirs = [Round(1, 10), Round(2, 10), Round(3, 10), Round(4, 10), Round(5, 99, bottleneck="late")]
    ours = [Round(1, 99, bottleneck="late"), Round(2, 5), Round(3, 5), Round(4, 5), Round(5, 5)]
    (found,) = ratios(run(Series("m", "theirs", theirs), Series("m", "ours", ours)), BASELINES)
    assert (found.median, found.rounds) == (0.5, 3)


def test_a_reference_is_compared_with_what_decided_it_beside():
    wire = [Round(number, 1, bottleneck="busy") for number in (1, 2, 3)]
    found = ratios(
        run(Series("m", "theirs", rounds(10, 10, 10)), Series("m", "tcp", wire, remark="bound by the generator")),
        BASELINES,
    )
    assert [one.rounds for one in found] == [3]


@pytest.mark.parametrize(
    "series",
    [
        [Series("m", "ours", rounds(1, 1, 1))],
        [Series("m", "ours", rounds(1, 1, 1)), Series("m", "theirs", rounds(1, 1, 1), refused="it hung up")],
        [Series("m", "ours", rounds(1, 1, 1), refused="it hung up"), Series("m", "theirs", rounds(1, 1, 1))],
        [Series("m", "ours", rounds(1, 1)), Series("m", "theirs", rounds(1, 1, 1))],
        [Series("m", "ours", rounds(0, 0, 0)), Series("m", "theirs", rounds(1, 1, 1))],
    ],
    ids=["no baseline", "the baseline is refused", "refused", "two rounds", "nothing measured"],
)
def test_no_ratio_without_three_rounds_of_both(series):
    assert ratios(run(*series), BASELINES) == []
