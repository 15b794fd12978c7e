"""Histograms of latencies, as the load generator counts them: {lower bound of a bucket in ns: how many}.

The buckets are HdrHistogram's: 64 ns wide up to 131 us, then 1024 to each power of two (benchmarks/load/histogram.h),
so that a value is known to 64 ns or to 0.1 %, whichever is more. A bucket stands for its middle.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

Histogram = Mapping[int, int]

_UNIT_BITS = 6
_DIGIT_BITS = 10
_LONGEST_NS = (1 << 40) - 1
"""18 minutes; what is longer counts as that."""


def width(value_ns: int) -> int:
    """How wide the bucket is that holds this value, in ns."""
    return 1 << max(_UNIT_BITS, min(value_ns, _LONGEST_NS).bit_length() - 1 - _DIGIT_BITS)


def bucket(value_ns: int) -> int:
    """The lower bound of the bucket that holds this value, in ns."""
    held = min(value_ns, _LONGEST_NS)
    return held - held % width(held)


def histogram_of(values_ns: Iterable[int]) -> dict[int, int]:
    """What the load generator would have counted."""
    return dict(sorted(Counter(map(bucket, values_ns)).items()))


def count(histogram: Histogram) -> int:
    return sum(histogram.values())


def percentile(histogram: Histogram, share: float) -> float:
    """The value, in ns, that so much of all values (0 to 1) do not exceed. Raises ValueError when there is none."""
    if not 0 <= share <= 1:
        raise ValueError(f"not a share from 0 to 1: {share}")
    # The nearest rank: of 100 values, p99 is the 99th. Rounded before the ceiling, or 0.07 of 100 were the 8th.
    rank = max(1, math.ceil(round(share * count(histogram), 6)))
    seen = 0
    for lower in sorted(histogram):
        seen += histogram[lower]
        if seen >= rank:
            return _middle(lower)
    raise ValueError("an empty histogram has no percentiles")


def mean(histogram: Histogram) -> float:
    """In ns. Raises ValueError when the histogram is empty."""
    counted = count(histogram)
    if not counted:
        raise ValueError("an empty histogram has no mean")
    return sum(_middle(lower) * number for lower, number in histogram.items()) / counted


def merge(histograms: Iterable[Histogram]) -> dict[int, int]:
    """All values of all of them."""
    merged: Counter[int] = Counter()
    for one in histograms:
        merged.update(one)
    return dict(sorted(merged.items()))


def count_above(histogram: Histogram, value_ns: float) -> int:
    """How many values are in buckets that begin above this one."""
    return sum(number for lower, number in histogram.items() if lower > value_ns)


def _middle(lower_ns: int) -> float:
    return lower_ns + width(lower_ns) / 2
