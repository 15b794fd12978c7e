"""What is said of numbers: losses, targets, percentiles."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness.histogram import histogram_of, width
from benchmarks.harness.results import (
    UNSUSTAINED,
    Better,
    Measure,
    Prediction,
    Ratio,
    Results,
    Round,
    Series,
    Target,
)
from benchmarks.harness.targets import TARGETS
from benchmarks.report.findings import OURS, TAIL, Findings, curve, details, judgement, outcome, parameter, verdict
from benchmarks.report.wording import number, question, ratio, short, times

LESS = Measure("time", "paths", "round trip", "64 B", "us")
TIMES = st.integers(1, 10**9)
MORE = Measure("speed", "paths", "bulk", "1 stream", "Gbit/s", "more")


def compared(low: float, high: float, *, measure: str = "time", subject: str = "uproxy", key: str = "value") -> Ratio:
    return Ratio(measure, subject, "envoy", key, math.sqrt(low * high), low, high, 7)


def losses(*ratios: Ratio) -> list[Ratio]:
    results = Results("2026-11-23T06:10:00Z", False, measures=[LESS, MORE], ratios=list(ratios))
    return [loss.ratio for loss in Findings(results).losses()]


def test_a_loss_is_a_whole_interval_on_the_wrong_side() -> None:
    slower, slow = compared(1.01, 1.2), compared(0.5, 0.9, measure="speed")
    assert losses(slower, slow) == [slow, slower]
    assert losses(compared(0.99, 1.2), compared(0.5, 1.0, measure="speed")) == []
    assert losses(compared(0.8, 0.99), compared(1.01, 2, measure="speed")) == []


def test_less_processor_time_is_better_of_anything() -> None:
    assert verdict(compared(1.1, 1.2, measure="speed", key="cpu_us"), MORE) == "worse"
    assert verdict(compared(0.8, 0.9, measure="speed", key="cpu_us"), MORE) == "better"


def test_a_detail_counts_only_where_a_target_is_about_it() -> None:
    slow, hungry = compared(1.1, 1.2), compared(1.3, 1.4, key="cpu_us")
    assert losses(slow, hungry) == [slow]
    about = Target("", "time", "uproxy", "envoy", "cpu_us", 0.5, "less")
    results = Results("2026-11-23T06:10:00Z", False, measures=[LESS], ratios=[slow, hungry], targets=[about])
    assert [loss.ratio for loss in Findings(results).losses()] == [hungry, slow]


def test_nothing_is_said_of_a_detail_whose_better_side_is_unknown() -> None:
    assert losses(compared(2, 3, key="operations")) == []
    assert verdict(compared(2, 3, key="operations"), LESS) == "unclear"


def test_another_ones_loss_is_not_ours() -> None:
    assert losses(compared(2, 3, subject="haproxy-tls")) == []
    assert len(losses(compared(2, 3, subject="remote"))) == 1


def test_uproxies_without_l7_neither_lose_nor_win_against_sidecars_with_it() -> None:
    for less, more in ((0.3, 0.5), (2, 3)):
        results = Results("now", False, measures=[LESS], ratios=[compared(less, more, subject="remote-l4")])
        assert (Findings(results).losses(), Findings(results).gains()) == ([], [])


def test_whatever_has_a_target_is_ours() -> None:
    assert {target.subject for target in TARGETS} <= OURS


@pytest.mark.parametrize(
    ("better", "bound", "low", "high", "said"),
    [
        ("less", 1.0, 0.64, 1.0, "met: the median is 20 % within, the interval's end 0 % within"),
        ("less", 0.5, 0.6, 0.735, "not met: the median is 33 % off, the interval's end 47 % off"),
        ("less", 1.0, 0.7, 1.1, "not met: the median is 12 % within, the interval's end 10 % off"),
        ("more", 0.9, 0.99, 1.21, "met: the median is 22 % within, the interval's end 10 % within"),
        ("more", 2.0, 1.0, 1.21, "not met: the median is 45 % off, the interval's end 50 % off"),
        ("more", 2.0, 1.5, 3.0, "not met: the median is 6 % within, the interval's end 25 % off"),
    ],
)
def test_a_target_says_how_far_off_it_is(better: Better, bound: float, low: float, high: float, said: str) -> None:
    assert outcome(Target("", "time", "uproxy", "envoy", "value", bound, better, compared(low, high))) == said


def test_a_target_that_was_not_measured_says_so() -> None:
    assert outcome(Target("", "time", "uproxy", "envoy", "value", 1, "less")) == "not measured"
    elsewhere = Target("", "time", "uproxy", "envoy", "value", 1, "less", elsewhere="not built yet")
    assert outcome(elsewhere) == "not measured here: not built yet"


def test_an_axis_is_the_one_parameter_that_varies() -> None:
    def measures(*parameters: dict[str, float]) -> list[Measure]:
        return [Measure(str(n), "s", "g", "l", "us", "less", one) for n, one in enumerate(parameters)]

    assert parameter(measures({"connections": 1, "bytes": 64}, {"connections": 16, "bytes": 64})) == "connections"
    assert parameter(measures({"connections": 1, "bytes": 64}, {"connections": 16, "bytes": 1024})) is None
    assert parameter(measures({"rate": 1}, {"rate": 1})) is None
    assert parameter(measures({"rate": 1}, {"bytes": 1})) is None
    assert parameter(measures({"rate": 1})) is None


@given(st.one_of(st.lists(TIMES, max_size=2 * TAIL), st.lists(TIMES, min_size=2 * TAIL, max_size=300)))
def test_a_curve_is_what_sorting_finds(times_ns: list[int]) -> None:
    points = curve(histogram_of(times_ns))
    assert bool(points) == (len(times_ns) >= 2 * TAIL)
    ordered = sorted(times_ns)
    for nines, value in points:
        slower = len(ordered) * 10**-nines
        assert slower >= TAIL * (1 - 1e-9)
        exact = ordered[math.ceil(round(len(ordered) - slower, 6)) - 1]
        assert abs(value - exact) <= width(exact)
    assert all(one[0] < two[0] and one[1] <= two[1] for one, two in pairwise(points))


def test_numbers_have_three_digits_that_mean_something() -> None:
    assert [number(one) for one in (0, 0.01234, 1.234, 12.34, 123.4, 12345.6, -1.5)] == [
        "0", "0.0123", "1.23", "12.3", "123", "12,346", "-1.50",
    ]  # fmt: skip
    assert [short(one) for one in (0, 0.5, 500, 5000, 20000, 3e6)] == ["0", "0.5", "500", "5000", "20k", "3M"]


def test_a_ratio_near_1_shows_its_side() -> None:
    assert [times(one) for one in (0.996, 1.0, 1.004, 0.75, 0.0213, 12.3)] == [
        "0.996", "1.00", "1.004", "0.75", "0.021", "12.30",
    ]  # fmt: skip
    assert ratio(compared(0.9, 1.1)) == "0.995 (0.90\N{EN DASH}1.10)"


def test_a_question_names_its_group_once() -> None:
    assert question(LESS) == "round trip, 64 B"
    assert question(Measure("n", "s", "round trip", "round trip of 64 B", "us")) == "round trip of 64 B"


def test_a_rate_that_ours_did_not_sustain_is_said() -> None:
    measure = Measure("architectures/latency/1000", "architectures", "latency", "p99 at 1,000 requests/s", "us")
    why = f"{UNSUSTAINED} 1,000 requests/s: 700 ms (3 of 3 rounds)"
    results = Results(
        "now",
        False,
        measures=[measure],
        series=[
            Series(measure.name, "sidecar", [Round(1, 5.0)]),
            Series(measure.name, "node", refused=why),
            Series(measure.name, "remote-l4", refused=why),
            Series(measure.name, "remote", refused=why),
            Series(measure.name, "ours", refused="the load generator sent late"),
        ],
    )
    findings = Findings(results)
    assert [one.text for one in findings.unsustained()] == [
        f"remote {why}, at latency, p99 at 1,000 requests/s; sidecar did"
    ]
    assert [len(one.unsustained) for one in findings.tallies()] == [1]
    results.series[0].refused = why
    assert [one.by for one in Findings(results).unsustained()] == [""]


@pytest.mark.parametrize(("requests", "told"), [(9_999, False), (10_000, True)])
def test_p999_is_of_all_rounds_together_and_of_enough_requests(requests: int, told: bool) -> None:
    """Not the median of the rounds' own, which is that of one or two requests."""
    half = requests // 2
    rounds = [
        Round(1, 1.0, {"p999_us": 77.0, "added_p999_us": 7.0, "p50_us": 3.0}, {1000: half}),
        Round(2, 1.0, {"p999_us": 99.0, "added_p999_us": 9.0, "p50_us": 5.0}, {2000: requests - half}),
    ]
    found = details(Series("m", "a", rounds))
    assert found["p50_us"] == 4.0
    assert "added_p999_us" not in found
    assert ("p999_us" in found) is told
    assert not told or found["p999_us"] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(
    ("rounds", "said"), [(1, "one round: not decided"), (2, "2 rounds: not decided"), (3, "held"), (0, "not measured")]
)
def test_a_prediction_is_judged_by_three_rounds(rounds: int, said: str) -> None:
    found = Ratio("m", "a", "", "value", 2, 2, 2, rounds) if rounds else None
    findings = Findings(Results("now", False))
    assert judgement(findings, Prediction("lost", "m", "a", "", "value", 1, 8, found)) == said
