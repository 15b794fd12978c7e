"""What runs of earlier versions stated and this one does not."""

from __future__ import annotations

import pytest

from benchmarks.harness.results import Measure, Prediction, Ratio, Results, Round, Series, Target
from benchmarks.report.earlier import mended
from tests.support.results import realistic

FLOOD = "architectures/isolation/flood"
LATENCY = "architectures/latency/500"


def test_what_needs_no_mending_stays() -> None:
    assert mended(realistic()) == realistic()


def test_processor_time_beside_a_neighbour_is_not_shown() -> None:
    taken = {"cpu_us": 9.0, "cpu_us/waypoint": 5.0, "softirq_us": 2.0, "failed_percent": 1.0}
    results = Results(
        "then",
        False,
        series=[Series(name, "node", [Round(1, 5.0, dict(taken))]) for name in (FLOOD, LATENCY)],
        ratios=[Ratio(name, "node", "sidecar", "cpu_us", 2, 1, 3, 3) for name in (FLOOD, LATENCY)],
    )
    found = mended(results)
    assert [set(one.rounds[0].details) for one in found.series] == [{"failed_percent"}, set(taken)]
    assert [one.measure for one in found.ratios] == [LATENCY]
    assert set(results.series[0].rounds[0].details) == set(taken), "the run itself stays"


def test_a_p99_of_few_requests_has_no_ratio_any_more() -> None:
    def series(subject: str, operations: float) -> Series:
        details = {"p99_us": 5.0, "operations": operations}
        return Series(LATENCY, subject, [Round(number, 5.0, details) for number in (1, 2, 3)])

    ratio = Ratio(LATENCY, "node", "sidecar", "value", 2, 1, 3, 3)
    results = Results(
        "then",
        False,
        series=[series("node", 1500), series("sidecar", 600)],
        ratios=[ratio],
        targets=[Target("t", LATENCY, "node", "sidecar", "value", 1, "less", ratio)],
        predictions=[Prediction("p", LATENCY, "node", "sidecar", "value", 1, 2, ratio)],
    )
    found = mended(results)
    (withheld,) = found.withheld
    assert (found.ratios, found.targets[0].ratio, found.predictions[0].ratio) == ([], None, None)
    assert "600 in a round of sidecar" in withheld.reason
    assert found.targets[0].elsewhere == withheld.reason
    results.series = [series("node", 1500), series("sidecar", 1000)]
    assert mended(results) == results


@pytest.mark.parametrize(("punctual_us", "sustained"), [(900.0, False), (400.0, True)])
def test_a_rate_that_was_too_high_was_not_sustained_unless_the_generator_was_late(
    punctual_us: float, sustained: bool
) -> None:
    said = (
        "2 of 3 rounds say nothing of the subject: the rate was too high: the last request was sent 700 ms after its "
        "time, since every connection was busy; ask for less, or over more connections"
    )
    each = [Round(number, 1000.0, {"p99_us": 1000.0, "punctual/p99_us": punctual_us}, {}, "x") for number in (1, 2, 3)]
    measure = Measure(LATENCY, "architectures", "g", "l", "us", parameters={"rate": 1500})
    results = Results("then", False, measures=[measure], series=[Series(LATENCY, "ours", each, said)])
    found = mended(results).series[0].refused
    assert found == (
        said
        if sustained
        else "did not sustain 1,500 requests/s: the last request was sent 700 ms after its time, since every "
        "connection was busy (2 of 3 rounds)"
    )
