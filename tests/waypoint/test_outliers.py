"""Outlier detection against a naive model, and its rules one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control.api.balancing import OutlierDetection
from tests.support.examples import examples
from waypoint.outliers import Outliers, Record

ANY = OutlierDetection(max_ejection_percent=100)


def outliers(said: OutlierDetection, total: int = 10) -> Outliers:
    made = Outliers(said)
    made.total = total
    return made


def statuses(made: Outliers, record: Record, *found: int, now: float = 100.0) -> list[bool]:
    return [bool(made.answered(record, status, now)) for status in found]


def test_five_times_5xx_in_a_row():
    made, record = outliers(ANY), Record()
    assert statuses(made, record, 500, 503, 500, 500, 200, 500, 500, 500, 404, 500) == [False] * 10
    assert statuses(made, record, 500, 500, 500) == [False] * 3
    assert made.answered(record, 500, 100.0) == "5 times in a row 5xx or no answer; ejected for 30 s"
    assert (record.ejected, made.count, made.next_return) == (True, 1, 130.0)


def test_gateway_errors_have_a_count_of_their_own():
    said = replace(ANY, consecutive_5xx=0, consecutive_gateway=3)
    made, record = outliers(said), Record()
    assert statuses(made, record, 502, 503, 500, 504, 503) == [False] * 5, "500 is no gateway error"
    assert statuses(made, record, 502) == [True]


def test_without_a_reason_nobody_is_ejected():
    made, record = outliers(replace(ANY, consecutive_5xx=0)), Record()
    assert statuses(made, record, *[503] * 100) == [False] * 100
    assert not any(made.unanswered(record, late=False, now=1.0) for _ in range(100))


def test_no_answer_counts_as_503_or_apart():
    made, record = outliers(ANY), Record()
    assert statuses(made, record, 500, 500, 500, 500) == [False] * 4
    assert made.unanswered(record, late=False, now=1.0)
    late = outliers(replace(ANY, consecutive_5xx=0, consecutive_gateway=1))
    assert late.unanswered(Record(), late=True, now=1.0)
    split, record = outliers(replace(ANY, split_local_origin=True, consecutive_local_origin=2)), Record()
    assert statuses(split, record, 500, 500, 500, 500) == [False] * 4
    assert not split.unanswered(record, late=False, now=1.0)
    assert split.answered(record, 500, 1.0), "an answer of the fifth 5xx"
    other = Record()
    assert not split.unanswered(other, late=False, now=1.0)
    assert statuses(split, other, 200) == [False]
    assert not split.unanswered(other, late=True, now=1.0), "it has answered in between"
    assert split.unanswered(other, late=True, now=1.0)


def test_each_time_lasts_longer_and_good_times_are_remembered():
    made, record = outliers(replace(ANY, consecutive_5xx=1, base_ejection_ms=10_000)), Record()
    now, lasted = 1000.0, []
    for _ in range(3):
        assert made.answered(record, 500, now)
        lasted.append(record.until - now)
        now = record.until
        made.take_back(now)
        assert not record.ejected
    assert lasted == [10.0, 20.0, 30.0]
    now += 20.0  # two intervals of 10 s
    assert made.answered(record, 500, now)
    assert record.until - now == 20.0
    made.take_back(record.until)
    now = record.until + 1000
    assert made.answered(record, 500, now)
    assert record.until - now == 10.0


def test_no_time_is_longer_than_the_longest():
    made, record = outliers(replace(ANY, consecutive_5xx=1, base_ejection_ms=200_000)), Record()
    assert made.answered(record, 500, 0.0)
    made.take_back(200.0)
    assert made.answered(record, 500, 200.0)
    assert record.until == 500.0


@pytest.mark.parametrize(
    ("percent", "total", "ejected"),
    [(10, 10, 1), (10, 3, 1), (50, 10, 5), (50, 1, 0), (0, 9, 0), (100, 1, 1)],
)
def test_so_many_at_a_time_and_one_of_several_in_any_case(percent, total, ejected):
    made = outliers(replace(ANY, consecutive_5xx=1, max_ejection_percent=percent), total)
    records = [Record() for _ in range(total)]
    for record in records:
        made.answered(record, 500, 1.0)
    assert made.count == sum(record.ejected for record in records) == ejected


def test_with_too_few_left_ejections_do_not_count():
    made = outliers(replace(ANY, consecutive_5xx=1, min_health_percent=60), 5)
    records = [Record() for _ in range(5)]
    for record, suspended in zip(records[:3], (False, False, True), strict=True):
        made.answered(record, 500, 1.0)
        assert made.suspended is suspended
    made.drop([records[0]])
    made.total = 4
    assert (made.count, made.suspended) == (2, True)
    made.take_back(31.0)
    assert (made.count, made.suspended) == (0, False)


@settings(max_examples=examples(200))
@given(
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(0, 100),
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([200, 404, 500, 503, 0]), st.integers(0, 20)), max_size=80),
)
def test_as_a_naive_model_says(of_5xx, of_gateway, percent, steps):
    said = OutlierDetection(of_5xx, of_gateway, base_ejection_ms=5000, interval_ms=4000, max_ejection_percent=percent)
    made, records, now = outliers(said, 4), [Record() for _ in range(4)], 1000.0
    history: list[list[int]] = [[] for _ in records]
    until, times, ended = [0.0] * 4, [0] * 4, [0.0] * 4
    for which, status, pause in steps:
        now += pause
        if now >= made.next_return:
            made.take_back(now)
        out = [end > now for end in until]
        assert [record.ejected for record in records] == out
        if status:
            made.answered(records[which], status, now)
        else:
            made.unanswered(records[which], late=False, now=now)
        history[which].append(status or 503)
        tail = history[which]
        failed = len(tail) >= of_5xx and all(one >= 500 for one in tail[-of_5xx:])
        failed |= bool(of_gateway) and len(tail) >= of_gateway and all(one == 503 for one in tail[-of_gateway:])
        if failed:
            history[which] = []
            more = sum(out) + 1
            if not out[which] and (more / 4 * 100 <= percent or (more == 1 and percent)):
                times[which] = max(0, times[which] - int((now - ended[which]) // 4)) + 1
                until[which] = ended[which] = now + min(5 * times[which], 300)
