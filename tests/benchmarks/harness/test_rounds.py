"""The order of rounds and what is left of them, on a clock of the test's own."""

import pytest

from benchmarks.harness.results import UNSUSTAINED, Round, Series
from benchmarks.harness.rounds import Estimate, duration, in_turn, judge


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


GENERATOR, SUBJECT = "its core was busy 97 %", f"{UNSUSTAINED} 500 requests/s: 700 ms"


@pytest.mark.parametrize(
    ("bound", "refused", "remark"),
    [
        ([SUBJECT, "", "", ""], "", ""),
        ([SUBJECT, SUBJECT, "", ""], f"{SUBJECT} (2 of 4 rounds)", f"{SUBJECT} (2 of 4 rounds)"),
        ([SUBJECT, SUBJECT, GENERATOR, ""], f"{SUBJECT} (2 of 4 rounds)", f"{SUBJECT} (2 of 4 rounds)"),
        (
            [SUBJECT, GENERATOR, GENERATOR, ""],
            f"3 of 4 rounds say nothing of the subject: {GENERATOR}",
            f"bound by the generator: {GENERATOR}",
        ),
    ],
)
def test_a_rate_that_was_not_sustained_is_the_subjects_matter(bound, refused, remark):
    found, reference = (
        Series("m", "a", [Round(number, 1.0, bottleneck=why) for number, why in enumerate(bound)]) for _ in range(2)
    )
    judge(found, reference=False)
    judge(reference, reference=True)
    assert (found.refused, found.remark) == (refused, "")
    assert (reference.refused, reference.remark) == ("", remark)
