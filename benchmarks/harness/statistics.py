"""What may be said of a few rounds: the median ratio of subject and baseline, and an interval that holds the truth.

Rounds are the unit. Subject and baseline of the same round ran a moment apart, so their quotient is free of what the
machine did meanwhile; requests of one round are not independent of each other, and are never resampled.

The interval is the percentile bootstrap of the median of the ratios' logarithms, stretched. Unstretched, the bootstrap
of a median cannot reach beyond the extremes, so that of three rounds it holds the truth three times in four, not 95
times in 100, and of seven rounds 87 times. `stretch` is the factor that makes it 95 in 100 for ratios that scatter
log-normally, found by simulation with a fixed seed; other scatter, with outliers, skewed, or bounded, keeps between 92
and 97 in 100 (tests/benchmarks/harness/test_statistics.py shows each). The price of few rounds is width: 2.3 standard
deviations to each side of three rounds, 1.3 of five, 1.1 of seven, 0.9 of eleven.

How processes came to lie in memory, for one, is the same in all rounds of a run, and another in the next: no interval
of one run knows how much that moves. `RESTARTED` stands for it, in quadrature.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from statistics import median
from typing import Final

from benchmarks.harness.histogram import count
from benchmarks.harness.results import LEAST_ROUNDS, Ratio, Results, Round, Series, Withheld

CONFIDENCE: Final = 0.95
RESTARTED: Final = 0.03
"""What every interval reaches at least to each side: by so much the memory of processes, which hardly differs from
round to round, was seen to differ between runs that started them anew."""
KEYS: Final = ("value", "p50_us", "p99_us", "p999_us", "cpu_us")
"""What there are ratios of, where the rounds have it. Not of PSS, which those who stand side by side share."""
PUNCTUAL: Final = "punctual/"
"""Before a key, in the details of a round: what the value would be at the least had the load generator never been late.
The part of a delay that was its own is known for each request (benchmarks/load/requests.c)."""
_TAILS: Final = {"p99_us": 0.01, "p999_us": 0.001}
"""Percentile -> the share of operations that were slower."""
_SLOWER: Final = 10
"""Of a percentile, which a value may be too, there is a ratio where so many operations of each round were slower."""
TOO_FEW: Final = "too few requests"
"""How the reason begins why such a ratio is withheld."""

_RESAMPLES: Final = 20_000
_SIMULATIONS: Final = 50_000
_SEED: Final = 20_261_123


@dataclass(frozen=True, slots=True)
class Interval:
    median: float
    low: float
    high: float


def interval(ratios: Sequence[float]) -> Interval:
    """The median of ratios, each above 0, and its 95 % interval in this run. At least two are needed."""
    logarithms = sorted(map(math.log, ratios))
    middle = median(logarithms)
    reach = stretch(len(ratios)) * _reach(logarithms)
    return Interval(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach))


def for_any_run(found: Interval) -> Interval:
    """The interval with what another start of the processes would move: what is stated."""
    reach = math.hypot(math.log(found.high / found.median), RESTARTED)
    return Interval(found.median, found.median * math.exp(-reach), found.median * math.exp(reach))


@cache
def stretch(count: int) -> float:
    """How many times further than the plain bootstrap of `count` values the interval has to reach."""
    chance = random.Random(_SEED)
    drawn = [sorted(chance.gauss(0, 1) for _ in range(count)) for _ in range(_SIMULATIONS)]
    needed = sorted(abs(median(values)) / _reach(values) for values in drawn)
    return needed[math.ceil(CONFIDENCE * _SIMULATIONS) - 1]


def _reach(values: Sequence[float]) -> float:
    """From the median of sorted values to the further end of the percentile bootstrap's interval."""
    bootstrapped = sorted(((values[low] + values[high]) / 2, weight) for (low, high), weight in _middles(len(values)))
    reached = list(accumulate(weight for _, weight in bootstrapped))
    tail = (1 - CONFIDENCE) / 2 * _RESAMPLES
    lowest = next(value for (value, _), sum_ in zip(bootstrapped, reached, strict=True) if sum_ >= tail)
    highest = next(value for (value, _), sum_ in zip(bootstrapped, reached, strict=True) if sum_ >= _RESAMPLES - tail)
    return max(median(values) - lowest, highest - median(values))


@cache
def _middles(count: int) -> Sequence[tuple[tuple[int, int], int]]:
    """The bootstrap, once for all: which ranks are the middle two of a resample, and in how many of the resamples."""
    chance = random.Random(_SEED)
    ranks = (sorted(chance.choices(range(count), k=count)) for _ in range(_RESAMPLES))
    return sorted(Counter((one[(count - 1) // 2], one[count // 2]) for one in ranks).items())


def agree(one: Ratio, other: Ratio) -> bool:
    """Whether two runs say the same: their intervals have a value in common.

    Of ratios that did not change, about 1 in 200 is apart all the same. Of ratios that did, those are found that moved
    by more than both intervals reach: agreement is no proof that nothing changed, the more rounds the nearer to one.
    """
    return one.low <= other.high and other.low <= one.high


def ratios(results: Results, baselines: Mapping[str, str]) -> tuple[list[Ratio], list[Withheld]]:
    """All ratios of a run to the baseline of each suite (suite -> subject). None of what was refused."""
    found: list[Ratio] = []
    withheld: list[Withheld] = []
    for measure in results.measures:
        baseline = results.find(measure.name, baselines.get(measure.suite, ""))
        if baseline is None or baseline.refused:
            continue
        for series in results.series:
            if series.measure == measure.name and series is not baseline and not series.refused:
                for key in KEYS:
                    one = paired(series, baseline, key)
                    found += [one] if isinstance(one, Ratio) else []
                    withheld += [one] if isinstance(one, Withheld) else []
    return found, withheld


def value(results: Results, measure: str, subject: str) -> Ratio | None:
    """What a series says by itself, as a ratio to nothing; None where it has no number, or too few rounds."""
    series = results.find(measure, subject)
    if series is None or series.refused or len(series.counted) < LEAST_ROUNDS:
        return None
    found = for_any_run(interval([one.value for one in series.counted]))
    return Ratio(measure, subject, "", "value", found.median, found.low, found.high, len(series.counted))


def paired(series: Series, baseline: Series, key: str) -> Ratio | Withheld | None:
    """The ratio of two series of one measure; None of percentiles beside the value that are luck, and of few rounds."""
    if reason := too_few(series, key) or too_few(baseline, key):
        return Withheld(series.measure, series.subject, baseline.subject, key, reason) if key == "value" else None
    ours, theirs = _by_round(series, key), _by_round(baseline, key)
    numbers = sorted(ours.keys() & theirs.keys())
    if len(numbers) < LEAST_ROUNDS:
        return None
    found = for_any_run(interval([ours[number] / theirs[number] for number in numbers]))
    # Had the generator been in time, either side would have been measured between its two values.
    least = median(_punctual(series, key, ours)[number] / theirs[number] for number in numbers)
    most = median(ours[number] / _punctual(baseline, key, theirs)[number] for number in numbers)
    if least < found.low or most > found.high:
        reason = (
            f"the load generator was late: a punctual one might have found anything from {least:.2f} to {most:.2f}, "
            f"which is more than the interval ({found.low:.2f} to {found.high:.2f})"
        )
        return Withheld(series.measure, series.subject, baseline.subject, key, reason)
    return Ratio(
        series.measure, series.subject, baseline.subject, key, found.median, found.low, found.high, len(numbers)
    )


def _punctual(series: Series, key: str, values: Mapping[int, float]) -> dict[int, float]:
    """The least that a generator which is never late might have found; what was found, where it cannot be late."""
    least = {one.number: one.details.get(f"{PUNCTUAL}{key}", 0.0) for one in series.counted}
    return {number: least[number] or value for number, value in values.items()}


def _by_round(series: Series, key: str) -> dict[int, float]:
    values = {one.number: one.value if key == "value" else one.details.get(key, 0.0) for one in series.counted}
    return {number: value for number, value in values.items() if value > 0}


def too_few(series: Series, key: str) -> str:
    """Why a percentile of these rounds is luck; empty where enough requests were slower, and of anything else."""
    share = _TAILS.get(_percentile_of(series) if key == "value" else key)
    least = min((_operations(one) for one in series.counted), default=0.0)
    if share is None or least * share >= _SLOWER:
        return ""
    return (
        f"{TOO_FEW}: {least:.0f} in a round of {series.subject}, of which {least * share:.1f} are slower than "
        f"this percentile; {_SLOWER} have to be"
    )


def _percentile_of(series: Series) -> str:
    """Which percentile the value is, if any."""
    for key in _TAILS:
        if series.counted and all(one.value == one.details.get(key) for one in series.counted):
            return key
    return ""


def _operations(one: Round) -> float:
    return one.details.get("operations") or count(one.histogram)
