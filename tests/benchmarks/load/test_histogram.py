"""Histograms against the sorted samples that they stand for, and against the C program's own buckets."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness import histogram
from benchmarks.harness.histogram import bucket, histogram_of, width

# Of every size: most numbers that hypothesis draws from a range are large.
VALUES = st.integers(0, 39).flatmap(lambda bits: st.integers(0, (1 << bits + 1) - 1))
SAMPLES = st.lists(VALUES, min_size=1, max_size=200)


@given(VALUES)
def test_a_bucket_holds_its_value_to_64_ns_or_a_thousandth(value: int):
    assert bucket(value) <= value < bucket(value) + width(value)
    assert width(value) <= max(64, value / 1024)
    assert bucket(bucket(value)) == bucket(value)
    assert width(bucket(value)) == width(value)


@given(VALUES)
def test_buckets_leave_no_gap_and_do_not_overlap(value: int):
    lower = bucket(value)
    after = min(lower + width(value), (1 << 40) - 1)
    assert after == (1 << 40) - 1 or bucket(after) == after


def test_what_takes_longer_than_the_longest_counts_as_that():
    assert bucket(1 << 60) == bucket((1 << 40) - 1) == (1 << 40) - (1 << 29)


@given(SAMPLES, st.floats(0, 1))
def test_percentiles_are_those_of_the_sorted_samples(samples: list[int], share: float):
    exact = sorted(samples)[max(0, math.ceil(round(share * len(samples), 6)) - 1)]
    found = histogram.percentile(histogram_of(samples), share)
    assert abs(found - exact) <= width(exact) / 2


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.01, 1), (0.07, 7), (0.5, 50), (0.99, 99), (1.0, 100)])
def test_a_percentile_has_the_nearest_rank(share: float, value: int):
    counted = histogram_of(thousands * 1000 for thousands in range(1, 101))
    assert histogram.percentile(counted, share) == pytest.approx(value * 1000, abs=32)


@given(SAMPLES)
def test_the_mean_is_that_of_the_samples(samples: list[int]):
    exact = sum(samples) / len(samples)
    # Half a bucket: 32 ns, or half a thousandth; of small and large samples together, both.
    assert abs(histogram.mean(histogram_of(samples)) - exact) <= exact / 2048 + 32


@given(st.lists(SAMPLES, max_size=5))
def test_merged_histograms_are_the_histogram_of_all(parts: list[list[int]]):
    merged = histogram.merge(histogram_of(part) for part in parts)
    assert merged == histogram_of(value for part in parts for value in part)
    assert histogram.count(merged) == sum(map(len, parts))


@given(SAMPLES, VALUES)
def test_what_is_above_a_value_is_counted_by_buckets(samples: list[int], value: int):
    above = histogram.count_above(histogram_of(samples), value)
    assert above == sum(bucket(sample) > value for sample in samples)
    assert above <= sum(sample > value for sample in samples)


@pytest.mark.parametrize("share", [-0.1, 1.1, 99, math.nan])
def test_a_share_is_from_0_to_1(share: float):
    with pytest.raises(ValueError, match="not a share"):
        histogram.percentile({64: 1}, share)


def test_an_empty_histogram_has_neither_percentiles_nor_a_mean():
    with pytest.raises(ValueError, match="empty"):
        histogram.percentile({}, 0.5)
    with pytest.raises(ValueError, match="empty"):
        histogram.mean({})
    assert histogram.merge([]) == {}
    assert histogram.count_above({}, 0) == 0
