"""The order of rounds and what is left of them, on a clock of the test's own."""

import pytest

from benchmarks.harness.rounds import Estimate, duration, in_turn


def test_another_subject_leads_each_round():
    assert [in_turn("abc", number) for number in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert in_turn([], 3) == []


def test_an_estimate_expects_of_the_rest_what_the_takes_so_far_needed():
    now = 100.0
    estimate = Estimate(60.0, clock=lambda: now)
    assert estimate.left_s() == 60.0
    now = 120.0
    estimate.taken(10.0)  # ten seconds of load took twenty
    assert estimate.left_s() == 100.0
    now = 125.0
    estimate.taken(40.0)
    assert estimate.left_s() == 5.0
    estimate.taken(10.0)
    assert estimate.left_s() == 0.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3000, "50 min"), (5400, "1 h 30 min"), (7200, "2 h 0 min")],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text
