"""The order of rounds, how long they will still take, and which series may be reported."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from benchmarks.harness.results import UNSUSTAINED, Series

WARM_UP_S: Final = 0.3
"""The longest that the round before the first one takes; it is not counted."""
_GENERATORS_SHARE: Final = 1 / 3
_BOUND: Final = "bound by the generator"

T = TypeVar("T")


def in_turn(subjects: Sequence[T], number: int) -> list[T]:
    """Who is measured in which order in one round. Another one leads each, lest one always runs behind the same."""
    first = number % len(subjects) if subjects else 0
    return [*subjects[first:], *subjects[:first]]


def judge(series: Series, *, reference: bool) -> None:
    """Refuse a series of which more than a third of the rounds say nothing: the load generator decided them, or the
    subject did not sustain the rate. A reference is labelled instead."""
    bound = [one.bottleneck for one in series.rounds if one.bottleneck]
    allowed = _GENERATORS_SHARE * len(series.rounds)
    if series.refused or len(bound) <= allowed:
        return
    own = [one for one in bound if one.startswith(UNSUSTAINED)]
    if len(own) > allowed:
        reason = remark = f"{own[0]} ({len(own)} of {len(series.rounds)} rounds)"
    else:
        most = max(sorted(set(bound)), key=bound.count)
        reason = f"{len(bound)} of {len(series.rounds)} rounds say nothing of the subject: {most}"
        remark = f"{_BOUND}: {most}"
    if reference:
        series.remark = remark
    else:
        series.refused = reason


class Estimate:
    """How long the remaining takes will need, by how long those before them did."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._left = seconds
        self._planned = 0.0
        self._began = clock()
        self._clock = clock

    def taken(self, seconds: float) -> None:
        """A take of so many seconds of load is over, or will not be made."""
        self._left -= seconds
        self._planned += seconds

    def left_s(self) -> float:
        """Starting and ending a generator takes time too: what the takes so far needed on top is expected again."""
        slower = (self._clock() - self._began) / self._planned if self._planned else 1.0
        return max(0.0, self._left * slower)


def duration(seconds: float) -> str:
    """ "40 s", "3 min", "1 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
