"""Which endpoints are left alone because they fail: Envoy's outlier detection, as Istio sets it. No I/O and no clock.

Each process of a waypoint, and each worker, judges by the answers that it has seen itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from control.api.balancing import OutlierDetection

LONGEST_S: Final = 300.0
"""For which an endpoint is ejected at most, unless `baseEjectionTime` is longer: Envoy's."""

_GATEWAY: Final = frozenset({502, 503, 504})
_UNREACHED: Final = 503
_LATE: Final = 504


@dataclass(slots=True, eq=False)
class Record:
    """What is known of one endpoint."""

    of_5xx: int = 0
    """In a row, as the others."""
    of_gateway: int = 0
    of_local_origin: int = 0
    until: float = 0.0
    """It is ejected until then, if it is (monotonic seconds); else the end of the last time."""
    ejected: bool = False
    times: int = 0
    """For how often it was ejected the next time is longer."""

    def forget(self) -> None:
        self.of_5xx = self.of_gateway = self.of_local_origin = 0


class Outliers:
    """Those of one service port. `now`: monotonic seconds."""

    __slots__ = ("_ejected", "_said", "next_return", "total")

    def __init__(self, said: OutlierDetection) -> None:
        self._said = said
        self._ejected: list[Record] = []
        self.total = 0
        """Endpoints, ejected or not."""
        self.next_return = math.inf
        """When one may come back."""

    @property
    def count(self) -> int:
        """Of those that are ejected."""
        return len(self._ejected)

    @property
    def suspended(self) -> bool:
        """Whether ejections do not count, because too few are left (Istio's minHealthPercent)."""
        return (self.total - self.count) * 100 < self._said.min_health_percent * self.total

    def answered(self, record: Record, status: int, now: float) -> str:
        """An endpoint has answered. Why it is ejected now, or empty."""
        record.of_local_origin = 0
        return self._count(record, status, now)

    def unanswered(self, record: Record, *, late: bool, now: float) -> str:
        """It was not reached, has broken off, or (`late`) took too long. Why it is ejected now, or empty."""
        if not self._said.split_local_origin:
            return self._count(record, _LATE if late else _UNREACHED, now)
        record.of_local_origin += 1
        if 0 < self._said.consecutive_local_origin <= record.of_local_origin:
            return self._eject(record, f"{record.of_local_origin} times in a row without an answer", now)
        return ""

    def _count(self, record: Record, status: int, now: float) -> str:
        if status < 500:
            record.of_5xx = record.of_gateway = 0
            return ""
        record.of_5xx += 1
        record.of_gateway = record.of_gateway + 1 if status in _GATEWAY else 0
        if 0 < self._said.consecutive_gateway <= record.of_gateway:
            return self._eject(record, f"{record.of_gateway} times in a row 502, 503, 504 or no answer", now)
        if 0 < self._said.consecutive_5xx <= record.of_5xx:
            return self._eject(record, f"{record.of_5xx} times in a row 5xx or no answer", now)
        return ""

    def _eject(self, record: Record, why: str, now: float) -> str:
        record.forget()
        if record.ejected or not self._may_eject():
            return ""
        forgotten = int((now - record.until) * 1000 // self._said.interval_ms)
        record.times = max(0, record.times - forgotten) + 1
        base_s = self._said.base_ejection_ms / 1000
        lasts_s = min(base_s * record.times, max(base_s, LONGEST_S))
        record.ejected, record.until = True, now + lasts_s
        self._ejected.append(record)
        self.next_return = min(self.next_return, record.until)
        return f"{why}; ejected for {lasts_s:g} s"

    def _may_eject(self) -> bool:
        """The first of several always, as Envoy does where it is told always_eject_one_host."""
        most = self._said.max_ejection_percent * self.total
        return (self.count + 1) * 100 <= most or (self.count == 0 and self.total > 1 and most > 0)

    def take_back(self, now: float) -> None:
        """Those whose time is over."""
        for record in self._ejected:
            record.ejected = record.until > now
        self._kept()

    def drop(self, records: Iterable[Record]) -> None:
        """Of what is no endpoint any more."""
        for record in records:
            record.ejected = False
        self._kept()

    def _kept(self) -> None:
        self._ejected = [record for record in self._ejected if record.ejected]
        self.next_return = min((record.until for record in self._ejected), default=math.inf)
